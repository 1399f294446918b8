"""Images are kept byte for byte, made smaller or converted, and nothing else becomes of them."""

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


def difference(treated: ProcessedImage, picture: Image.Image) -> float:
    """Return the mean difference between an image and how it should look."""
    return float(np.abs(pixels_of(treated.image) - np.asarray(picture).astype(np.int16)).mean())


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_usable_images_are_kept(name: str, on_bad: str) -> None:
    assert process_image(memoryview(USABLE[name]), "a.JPEG", ImageOptions(on_bad=on_bad)) == KEPT


@pytest.mark.parametrize(("on_bad", "action"), [("fail", "failed"), ("skip", "skipped")])
def test_faulty_images(on_bad: str, action: str, tmp_path: Path) -> None:
    for how in (ImageOptions(on_bad=on_bad), ImageOptions(on_bad=on_bad, short_side=64)):
        for name, (image, _) in unusable(tmp_path).items():
            treated = process_image(memoryview(image), "a.JPEG", how)
            assert treated == ProcessedImage(None, treated.reason, action, False, False), name
            assert treated.reason, name


def test_what_convert_saves(tmp_path: Path) -> None:
    results = {
        name: process_image(memoryview(image), "a.JPEG", CONVERT)
        for name, (image, _) in unusable(tmp_path).items()
    }
    saved = {name for name, treated in results.items() if treated.action == "converted"}
    assert saved == {
        *("half", "no end mark", "last byte missing", "half with an end mark", "half zeros"),
        *("larger than its data", "smaller than its data", "odd sampling"),
        *("gif", "webp", "bmp"),
    }
    for name, treated in results.items():
        if name in saved:
            assert treated.image is not None
            simplejpeg.decode_jpeg(treated.image, strict=True)
            assert treated.reencoded
        else:
            assert treated == ProcessedImage(None, treated.reason, "failed", False, False), name


def test_a_cut_image_keeps_what_is_there() -> None:
    jpeg = encoded(photo(), "JPEG", quality=95)
    treated = process_image(jpeg[: len(jpeg) // 2], "a.JPEG", CONVERT)
    top = photo().height // 3
    pixels = pixels_of(treated.image)
    assert np.abs(pixels[:top] - np.asarray(photo()).astype(np.int16)[:top]).mean() < 3
    assert treated.reason.startswith("cut short (no end-of-image mark); ")
    lost = int(treated.reason.split("; ")[1].removesuffix("% is blank"))
    assert lost == pytest.approx(100 * (pixels == pixels[-1, -1]).all(axis=2).mean(), abs=6)
    assert 20 < lost < 80
    whole = process_image(jpeg[:-2], "a.JPEG", CONVERT)
    assert whole.reason == "cut short (no end-of-image mark)"
    assert difference(whole, photo()) < 3


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_other_formats_become_jpeg(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(photo(), kind, **options)
    treated = process_image(image, "a.JPEG", CONVERT)
    reason = "a PNG named .JPEG" if kind == "PNG" else f"neither JPEG nor PNG but {kind}"
    assert treated.reason.lower() == reason.lower()
    assert (treated.action, treated.reencoded, treated.rotated) == ("converted", True, False)
    shown = Image.open(io.BytesIO(image)).convert("RGB")
    assert difference(treated, shown) < 4  # the dots of a GIF's colors do not compress well


def test_a_png_by_its_own_name_is_kept() -> None:
    assert process_image(USABLE["png"], "a.PNG", CONVERT) == KEPT
    assert process_image(USABLE["png"], "a.jpg", CONVERT).reason == "a PNG named .jpg"
    assert process_image(USABLE["jpeg"], "a.png", CONVERT) == KEPT


@pytest.mark.parametrize(("name", "color"), [("cmyk", "CMYK"), ("ycck", "YCCK")])
def test_cmyk_becomes_rgb(name: str, color: str) -> None:
    treated = process_image(USABLE[name], "a.JPEG", CONVERT)
    assert (treated.reason, treated.action) == (f"a {color} JPEG", "converted")
    assert treated.image is not None
    assert simplejpeg.decode_jpeg_header(treated.image)[2] == "YCbCr"
    if name == "cmyk":  # what is told to be YCCK has other colors than the picture
        assert difference(treated, photo()) < 3


def test_made_smaller() -> None:
    treated = process_image(
        memoryview(encoded(photo(150, 203), "JPEG", quality=95)), "a.JPEG", SMALL
    )
    assert treated == ProcessedImage(treated.image, "", "", reencoded=True, rotated=False)
    expected = photo(150, 203).resize((87, 64), Image.Resampling.BOX)
    assert difference(treated, expected) < 3
    assert Image.open(io.BytesIO(treated.image or b"")).size == (87, 64)


@pytest.mark.parametrize(("height", "width"), [(321, 489), (489, 321), (161, 243), (85, 83)])
def test_nothing_moves(height: int, width: int) -> None:
    """The decoder rounds sizes up that are no multiples of 8, 4 or 2 pixels."""
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
    ("short", "min_shrink", "smaller"),
    [
        (63, 1.0, False),
        (64, 1.0, False),
        (65, 1.0, True),
        (110, 1.1, True),
        (109, 1.1, False),
        (127, 2.0, False),
        (128, 2.0, True),
    ],
)
def test_only_shrinking_and_only_when_it_pays(short: int, min_shrink: float, smaller: bool) -> None:
    side = 100 if min_shrink == 1.1 else 64
    how = ImageOptions(short_side=side, min_shrink=min_shrink)
    treated = process_image(encoded(photo(short, short + 40), "JPEG"), "a.JPEG", how)
    assert treated.reencoded is smaller
    if treated.image is None:
        assert treated == KEPT
    else:
        width = round((short + 40) * side / short)
        assert Image.open(io.BytesIO(treated.image)).size == (width, side)


@pytest.mark.parametrize("name", ["65500x1", "1x65500", "1x1", "png 1x1"])
def test_thin_images_are_kept(name: str) -> None:
    assert process_image(USABLE[name], "a.png", ImageOptions(short_side=1, min_shrink=1)) == KEPT


def test_a_large_photo_is_made_smaller() -> None:
    treated = process_image(USABLE["12 MP"], "a.JPEG", SMALL)
    assert pixels_of(treated.image).shape == (64, 85, 3)


@pytest.mark.parametrize("on_bad", ["fail", "convert"])
def test_pngs_are_made_smaller_without_alpha(on_bad: str) -> None:
    how = ImageOptions(short_side=64, on_bad=on_bad)
    expected = photo().resize((85, 64), Image.Resampling.BOX)
    for picture in (photo(), with_alpha(photo())):
        treated = process_image(encoded(picture, "PNG"), "a.png", how)
        assert treated == ProcessedImage(treated.image, "", "", reencoded=True, rotated=False)
        assert difference(treated, expected) < 3
    assert difference(process_image(USABLE["png 16 bit"], "a.png", how), expected) < 3
    gray = photo().convert("L").resize((85, 64), Image.Resampling.BOX)
    for name in ("png gray", "png gray alpha"):
        assert difference(process_image(USABLE[name], "a.png", how), gray) < 3


def test_converted_and_made_smaller() -> None:
    how = ImageOptions(short_side=64, on_bad="convert", quality=50)
    gif = process_image(encoded(photo(), "GIF"), "a.gif", how)
    cmyk = process_image(USABLE["cmyk"], "a.JPEG", how)
    assert (gif.action, cmyk.action) == ("converted", "converted")
    assert pixels_of(gif.image).shape == pixels_of(cmyk.image).shape == (64, 85, 3)
    assert len(cmyk.image or b"") < len(
        process_image(USABLE["cmyk"], "a.JPEG", ImageOptions(short_side=64, quality=95)).image
        or b""
    )


@pytest.mark.parametrize("check", ["header", "none"])
def test_damage_is_found_where_an_image_is_made_smaller(check: str) -> None:
    cut = USABLE["jpeg"][:-200] + b"\xff\xd9"
    assert process_image(cut, "a.JPEG", ImageOptions(check=check)) == KEPT
    treated = process_image(cut, "a.JPEG", ImageOptions(check=check, short_side=64))
    assert (treated.image, treated.action) == (None, "failed")
    assert "premature end of data segment" in treated.reason


def test_arithmetic_coding_and_odd_sampling() -> None:
    smaller = process_image(ARITHMETIC, "a.JPEG", ImageOptions(short_side=8))
    assert pixels_of(smaller.image).shape == (8, 12, 3)
    saved = process_image(ODD_SAMPLING, "a.JPEG", CONVERT)
    assert difference(saved, Image.open(io.BytesIO(ODD_SAMPLING))) < 6


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_dropped_and_told(order: str) -> None:
    jpeg = USABLE["jpeg"]
    plain = process_image(jpeg, "a.JPEG", SMALL)
    for value in range(10):
        turned = oriented(jpeg, value, order)
        meant = value if 1 <= value <= 8 else 1
        assert orientation(turned) == orientation(memoryview(turned)) == meant
        treated = process_image(memoryview(turned), "a.JPEG", SMALL)
        assert treated == plain._replace(rotated=meant != 1)
        assert process_image(turned, "a.JPEG", ImageOptions()) == KEPT
    assert orientation(plain.image or b"") == 1


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"II",
        b"XX*\0\x08\0\0\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01",
    ],
)
def test_broken_exif_means_upright(tiff: bytes) -> None:
    image = with_exif(USABLE["jpeg"], tiff)
    assert orientation(image) == 1
    assert process_image(image, "a.JPEG", SMALL) == process_image(USABLE["jpeg"], "a.JPEG", SMALL)


def test_orientation_of_cut_headers() -> None:
    turned = oriented(USABLE["jpeg"], 6)
    found = [orientation(memoryview(turned[:size])) for size in range(60)]
    assert found == sorted(found)
    assert set(found) == {1, 6}


def test_orientation_behind_other_segments() -> None:
    turned = oriented(USABLE["jpeg"], 6)
    note = b"\xff\xff\xfe\x00\x06Exif"
    xmp = b"\xff\xe1\x00\x0ahttp://x"
    assert orientation(turned[:2] + note + xmp + turned[2:]) == 6


def test_same_bytes_whatever_the_input_type_and_the_time() -> None:
    for name in ("jpeg", "png", "cmyk", "progressive"):
        image = USABLE[name]
        first = process_image(image, "a.JPEG", SMALL)
        assert first.image
        assert process_image(memoryview(image), "a.JPEG", SMALL) == first
        assert process_image(memoryview(b"12345" + image)[5:], "b.JPEG", SMALL) == first


def test_better_quality_is_closer() -> None:
    expected = photo().resize((85, 64), Image.Resampling.BOX)
    errors = [
        difference(
            process_image(USABLE["png"], "a.png", ImageOptions(short_side=64, quality=q)), expected
        )
        for q in (5, 50, 95)
    ]
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
            treated = process_image(image, member.name, ImageOptions(short_side=128, quality=95))
            short = min(picture.size)
            size = tuple(round(side * 128 / short) for side in picture.size)
            expected = picture.resize((size[0], size[1]), Image.Resampling.BOX)
            error = pixels_of(treated.image) - np.asarray(expected).astype(np.int16)
            assert np.abs(error.mean(axis=(0, 1))).max() < 1, member.name
            assert np.abs(error).mean() < 8, member.name


def test_described_for_the_manifest() -> None:
    assert describe_processing(ImageOptions()) == {
        "mode": "pass-through",
        "exif_orientation": "not applied",
    }
    told = describe_processing(ImageOptions(short_side=480, quality=92, min_shrink=1.2))
    assert (told["mode"], told["short_side"], told["quality"]) == ("short-side", 480, 92)
    assert told["min_shrink"] == 1.2
    assert (told["simplejpeg"], told["cv2"]) == (simplejpeg.__version__, cv2.__version__)
    assert str(told["libjpeg-turbo"])[0].isdigit()
    assert told["exif_orientation"] == "not applied; dropped where re-encoded"
    converting = describe_processing(CONVERT)
    assert (converting["mode"], converting["converted_quality"]) == ("pass-through", 95)


def test_problems_name_the_option() -> None:
    assert (
        image_option_errors(ImageOptions())
        == image_option_errors(ImageOptions(short_side=1, quality=1, min_shrink=1))
        == []
    )
    wrong = {
        "--check": ImageOptions(check="deep"),
        "--on-bad": ImageOptions(on_bad="ask"),
        "--on-bad convert needs --check decode": ImageOptions(on_bad="convert", check="header"),
        "--short-side": ImageOptions(short_side=0),
        "--quality 0": ImageOptions(quality=0),
        "--quality 101": ImageOptions(quality=101),
        "--min-shrink 0.9": ImageOptions(min_shrink=0.9),
        "--min-shrink nan": ImageOptions(min_shrink=float("nan")),
        "--min-shrink inf": ImageOptions(min_shrink=float("inf")),
    }
    for start, how in wrong.items():
        (line,) = image_option_errors(how)
        assert line.startswith(start)
    assert (
        len(image_option_errors(ImageOptions(check="x", on_bad="y", short_side=-1, quality=0))) == 4
    )
