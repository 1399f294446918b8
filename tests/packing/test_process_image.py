"""Images are kept byte for byte, made smaller, converted, skipped or refused."""

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from mpl_fast.packing.options import ImageOptions, image_option_errors
from mpl_fast.packing.write.jpeg_segments import orientation
from mpl_fast.packing.write.process_image import ProcessedImage, describe_processing, process_image
from tests.packing.hazard_images import (
    ARITHMETIC,
    ODD_SAMPLING,
    encoded,
    oriented,
    photo,
    unusable,
    usable,
    with_alpha,
    with_exif,
)

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-1000.tar"
KEPT = ProcessedImage(None, "", "", reencoded=False, rotated=False)
CONVERT = ImageOptions(on_bad="convert")
SMALL = ImageOptions(short_side=64)
USABLE = usable()


def pixels_of(image: bytes | None) -> NDArray[np.int16]:
    """Return (height, width, 3) RGB or (height, width) gray, by Pillow."""
    assert image is not None
    return np.asarray(Image.open(io.BytesIO(image))).astype(np.int16)


def difference(processed: ProcessedImage, expected: Image.Image) -> float:
    """Return the mean difference between an image and how it should look."""
    return float(np.abs(pixels_of(processed.image) - np.asarray(expected, np.int16)).mean())


def small_photo(height: int = 150, width: int = 200) -> Image.Image:
    """Return a photo whose short side is made 64 pixels by another method."""
    return photo(height, width).resize((round(width * 64 / height), 64), Image.Resampling.BOX)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_usable_images_are_kept(name: str, on_bad: str) -> None:
    assert process_image(memoryview(USABLE[name]), "a.JPEG", ImageOptions(on_bad=on_bad)) == KEPT


@pytest.mark.parametrize(
    ("options", "action"),
    [
        (ImageOptions(on_bad="fail"), "failed"),
        (ImageOptions(on_bad="fail", short_side=64), "failed"),
        (ImageOptions(on_bad="skip"), "skipped"),
        (ImageOptions(on_bad="skip", short_side=64), "skipped"),
        (CONVERT, "failed"),
    ],
)
def test_unusable_images(options: ImageOptions, action: str, tmp_path: Path) -> None:
    converted = set()
    for name, (image, _) in unusable(tmp_path).items():
        processed = process_image(memoryview(image), "a.JPEG", options)
        assert processed.reason, name
        if processed.action == "converted":
            converted.add(name)
            assert processed.image is not None
            simplejpeg.decode_jpeg(processed.image, strict=True)
            assert processed.reencoded
        else:
            assert processed == ProcessedImage(None, processed.reason, action, False, False), name
    expected = {
        *("half", "no end mark", "last byte missing", "half with an end mark", "half zeros"),
        *("larger than its data", "smaller than its data", "odd sampling"),
        *("gif", "webp", "bmp"),
    }
    assert converted == (expected if options == CONVERT else set())


def test_a_cut_image_keeps_what_is_there() -> None:
    jpeg = encoded(photo(), "JPEG", quality=95)
    processed = process_image(jpeg[: len(jpeg) // 2], "a.JPEG", CONVERT)
    top = photo().height // 3
    pixels = pixels_of(processed.image)
    assert np.abs(pixels[:top] - np.asarray(photo(), np.int16)[:top]).mean() < 3
    assert processed.reason.startswith("cut short (no end-of-image mark); ")
    lost = int(processed.reason.split("; ")[1].removesuffix("% is blank"))
    assert lost == pytest.approx(100 * (pixels == pixels[-1, -1]).all(axis=2).mean(), abs=6)
    assert 20 < lost < 80
    whole = process_image(jpeg[:-2], "a.JPEG", CONVERT)
    assert whole.reason == "cut short (no end-of-image mark)"
    assert difference(whole, photo()) < 3


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_other_formats_become_jpeg(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(photo(), kind, **options)
    processed = process_image(image, "a.JPEG", CONVERT)
    reason = "a PNG named .JPEG" if kind == "PNG" else f"neither JPEG nor PNG but {kind}"
    assert processed.reason.lower() == reason.lower()
    assert (processed.action, processed.reencoded, processed.rotated) == ("converted", True, False)
    shown = Image.open(io.BytesIO(image)).convert("RGB")
    assert difference(processed, shown) < 4  # the dots of a GIF's colors do not compress well


def test_a_png_by_its_own_name_is_kept() -> None:
    assert process_image(USABLE["png"], "a.PNG", CONVERT) == KEPT
    assert process_image(USABLE["png"], "a.jpg", CONVERT).reason == "a PNG named .jpg"
    assert process_image(USABLE["jpeg"], "a.png", CONVERT) == KEPT


@pytest.mark.parametrize("name", ["cmyk", "ycck"])
def test_cmyk_becomes_rgb(name: str) -> None:
    processed = process_image(USABLE[name], "a.JPEG", CONVERT)
    assert (processed.reason, processed.action) == (f"a {name.upper()} JPEG", "converted")
    assert processed.image is not None
    assert simplejpeg.decode_jpeg_header(processed.image)[2] == "YCbCr"
    if name == "cmyk":  # the YCCK mark gives the other file other colors than the picture
        assert difference(processed, photo()) < 3


def test_made_smaller() -> None:
    jpeg = encoded(photo(150, 203), "JPEG", quality=95)
    processed = process_image(memoryview(jpeg), "a.JPEG", SMALL)
    assert processed == ProcessedImage(processed.image, "", "", reencoded=True, rotated=False)
    assert pixels_of(processed.image).shape == (64, 87, 3)
    assert difference(processed, small_photo(150, 203)) < 3
    large = process_image(USABLE["12 MP"], "a.JPEG", SMALL)
    assert pixels_of(large.image).shape == (64, 85, 3)


@pytest.mark.parametrize(("height", "width"), [(321, 489), (489, 321), (161, 243), (85, 83)])
def test_no_shift_of_pixels(height: int, width: int) -> None:
    """The decoder rounds up sizes that are not multiples of 8, 4 or 2 pixels."""
    grays = np.add.outer(np.linspace(20, 120, height), np.linspace(0, 115, width))
    jpeg = encoded(Image.fromarray(grays.round().astype(np.uint8)), "JPEG", quality=98)
    pixels = pixels_of(process_image(jpeg, "a", ImageOptions(short_side=40, quality=98)).image)
    assert pixels.ndim == 2  # gray stays gray
    exact = cv2.resize(grays, pixels.shape[::-1], interpolation=cv2.INTER_AREA)
    error = pixels - exact
    # A pixel of the short side is 2.5 gray levels or more.
    assert np.abs(error).max() < 2
    assert np.abs(error[-4:].mean()) < 0.5
    assert np.abs(error[:, -4:].mean()) < 0.5


@pytest.mark.parametrize(
    ("short", "side", "min_shrink", "smaller"),
    [
        (63, 64, 1.0, False),
        (64, 64, 1.0, False),
        (65, 64, 1.0, True),
        (110, 100, 1.1, True),
        (109, 100, 1.1, False),
        (127, 64, 2.0, False),
        (128, 64, 2.0, True),
    ],
)
def test_minimum_shrink(short: int, side: int, min_shrink: float, smaller: bool) -> None:
    how = ImageOptions(short_side=side, min_shrink=min_shrink)
    processed = process_image(encoded(photo(short, short + 40), "JPEG"), "a.JPEG", how)
    assert processed.reencoded is smaller
    if smaller:
        width = round((short + 40) * side / short)
        assert pixels_of(processed.image).shape == (side, width, 3)
    else:
        assert processed == KEPT


@pytest.mark.parametrize("name", ["65500x1", "1x65500", "1x1", "png 1x1"])
def test_thin_images_are_kept(name: str) -> None:
    assert process_image(USABLE[name], "a.png", ImageOptions(short_side=1, min_shrink=1)) == KEPT


@pytest.mark.parametrize("on_bad", ["fail", "convert"])
def test_pngs_are_made_smaller_without_alpha(on_bad: str) -> None:
    how = ImageOptions(short_side=64, on_bad=on_bad)
    for picture in (photo(), with_alpha(photo())):
        processed = process_image(encoded(picture, "PNG"), "a.png", how)
        assert processed == ProcessedImage(processed.image, "", "", reencoded=True, rotated=False)
        assert difference(processed, small_photo()) < 3
    assert difference(process_image(USABLE["png 16 bit"], "a.png", how), small_photo()) < 3
    gray = photo().convert("L").resize((85, 64), Image.Resampling.BOX)
    for name in ("png gray", "png gray alpha"):
        assert difference(process_image(USABLE[name], "a.png", how), gray) < 3


def test_converted_and_made_smaller() -> None:
    how = ImageOptions(short_side=64, on_bad="convert", quality=50)
    gif = process_image(encoded(photo(), "GIF"), "a.gif", how)
    cmyk = process_image(USABLE["cmyk"], "a.JPEG", how)
    assert (gif.action, cmyk.action) == ("converted", "converted")
    assert pixels_of(gif.image).shape == pixels_of(cmyk.image).shape == (64, 85, 3)
    better = process_image(USABLE["cmyk"], "a.JPEG", ImageOptions(short_side=64, quality=95))
    assert len(cmyk.image or b"") < len(better.image or b"")


@pytest.mark.parametrize("check", ["header", "none"])
def test_damage_is_found_where_an_image_is_made_smaller(check: str) -> None:
    cut = USABLE["jpeg"][:-200] + b"\xff\xd9"
    assert process_image(cut, "a.JPEG", ImageOptions(check=check)) == KEPT
    processed = process_image(cut, "a.JPEG", ImageOptions(check=check, short_side=64))
    assert (processed.image, processed.action) == (None, "failed")
    assert "premature end of data segment" in processed.reason


def test_arithmetic_coding_and_odd_sampling() -> None:
    smaller = process_image(ARITHMETIC, "a.JPEG", ImageOptions(short_side=8))
    assert pixels_of(smaller.image).shape == (8, 12, 3)
    saved = process_image(ODD_SAMPLING, "a.JPEG", CONVERT)
    assert difference(saved, Image.open(io.BytesIO(ODD_SAMPLING))) < 6


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_dropped_and_reported(order: str) -> None:
    jpeg = USABLE["jpeg"]
    plain = process_image(jpeg, "a.JPEG", SMALL)
    for value in range(10):
        turned = oriented(jpeg, value, order)
        expected = value if 1 <= value <= 8 else 1
        assert orientation(turned) == orientation(memoryview(turned)) == expected
        processed = process_image(memoryview(turned), "a.JPEG", SMALL)
        assert processed == plain._replace(rotated=expected != 1)
        assert process_image(turned, "a.JPEG", ImageOptions()) == KEPT
    assert orientation(plain.image or b"") == 1


BROKEN_EXIF = [
    b"",
    b"II",
    b"XX*\0\x08\0\0\0",
    b"II*\0\xff\xff\xff\xff",
    b"MM\0*\0\0\0\x08\xff\xff",
    b"II*\0\x08\0\0\0\x01\0\x12\x01",
]


def test_orientation_in_odd_headers() -> None:
    small = process_image(USABLE["jpeg"], "a.JPEG", SMALL)
    for tiff in BROKEN_EXIF:
        image = with_exif(USABLE["jpeg"], tiff)
        assert orientation(image) == 1
        assert process_image(image, "a.JPEG", SMALL) == small
    turned = oriented(USABLE["jpeg"], 6)
    found = [orientation(memoryview(turned[:size])) for size in range(60)]  # cut headers
    assert found == sorted(found)
    assert set(found) == {1, 6}
    other_segments = b"\xff\xff\xfe\x00\x06Exif" + b"\xff\xe1\x00\x0ahttp://x"
    assert orientation(turned[:2] + other_segments + turned[2:]) == 6


def test_same_bytes_whatever_the_input_type_and_the_time() -> None:
    for name in ("jpeg", "png", "cmyk", "progressive"):
        image = USABLE[name]
        first = process_image(image, "a.JPEG", SMALL)
        assert first.image
        assert process_image(memoryview(image), "a.JPEG", SMALL) == first
        assert process_image(memoryview(b"12345" + image)[5:], "b.JPEG", SMALL) == first


def test_better_quality_is_closer() -> None:
    errors = []
    for quality in (5, 50, 95):
        how = ImageOptions(short_side=64, quality=quality)
        errors.append(difference(process_image(USABLE["png"], "a.png", how), small_photo()))
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs ../shared/data/imagenet-1000.tar")
def test_photographs_look_the_same() -> None:
    with tarfile.open(PHOTOS) as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")][::100]
        assert len(members) >= 10
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            image = file.read()
            picture = Image.open(io.BytesIO(image))
            processed = process_image(image, member.name, ImageOptions(short_side=128, quality=95))
            width, height = (round(side * 128 / min(picture.size)) for side in picture.size)
            expected = picture.resize((width, height), Image.Resampling.BOX)
            error = pixels_of(processed.image) - np.asarray(expected, np.int16)
            assert np.abs(error.mean(axis=(0, 1))).max() < 1, member.name
            assert np.abs(error).mean() < 8, member.name


def test_description_for_the_manifest() -> None:
    assert describe_processing(ImageOptions()) == {
        "mode": "pass-through",
        "exif_orientation": "not applied",
    }
    small = describe_processing(ImageOptions(short_side=480, quality=92, min_shrink=1.2))
    assert (small["mode"], small["short_side"], small["quality"]) == ("short-side", 480, 92)
    assert small["min_shrink"] == 1.2
    assert (small["simplejpeg"], small["cv2"]) == (simplejpeg.__version__, cv2.__version__)
    assert str(small["libjpeg-turbo"])[0].isdigit()
    assert small["exif_orientation"] == "not applied; dropped where re-encoded"
    converting = describe_processing(CONVERT)
    assert (converting["mode"], converting["converted_quality"]) == ("pass-through", 95)


@pytest.mark.parametrize(
    ("options", "errors"),
    [
        (ImageOptions(), []),
        (ImageOptions(short_side=1, quality=1, min_shrink=1), []),
        (ImageOptions(check="deep"), ["--check"]),
        (ImageOptions(on_bad="ask"), ["--on-bad"]),
        (
            ImageOptions(on_bad="convert", check="header"),
            ["--on-bad convert needs --check decode"],
        ),
        (ImageOptions(short_side=0), ["--short-side"]),
        (ImageOptions(quality=0), ["--quality 0"]),
        (ImageOptions(quality=101), ["--quality 101"]),
        (ImageOptions(min_shrink=0.9), ["--min-shrink 0.9"]),
        (ImageOptions(min_shrink=float("nan")), ["--min-shrink nan"]),
        (ImageOptions(min_shrink=float("inf")), ["--min-shrink inf"]),
        (ImageOptions(check="x", on_bad="y", short_side=-1, quality=0), ["--"] * 4),
    ],
)
def test_bad_options(options: ImageOptions, errors: list[str]) -> None:
    lines = image_option_errors(options)
    assert len(lines) == len(errors)
    assert all(line.startswith(start) for line, start in zip(lines, errors, strict=True))
