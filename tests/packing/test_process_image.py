"""Images are kept byte for byte, made smaller, converted, skipped or refused."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

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
    UNUSABLE,
    USABLE,
    encoded,
    oriented,
    photo,
    with_exif,
)

KEPT = ProcessedImage()
JPEG = USABLE["jpeg"]


def processed(image: bytes, name: str = "a.JPEG", **how: Any) -> ProcessedImage:
    """Process an image that begins anywhere in a buffer."""
    return process_image(memoryview(b"12345" + image)[5:], name, ImageOptions(**how))


def pixels_of(done: ProcessedImage) -> NDArray[np.int16]:
    """Return (height, width, 3) RGB or (height, width) gray, by Pillow."""
    assert done.image is not None
    return np.asarray(Image.open(io.BytesIO(done.image))).astype(np.int16)


def difference(done: ProcessedImage, expected: Image.Image) -> float:
    """Return the mean difference between a new image and how it should look."""
    return float(np.abs(pixels_of(done) - np.asarray(expected, np.int16)).mean())


def shrunk(picture: Image.Image, short: int = 64) -> Image.Image:
    """Return a picture whose short side is made `short` pixels by another method."""
    width, height = (round(side * short / min(picture.size)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_usable_images_are_kept(on_bad: str) -> None:
    for name, image in USABLE.items():
        assert processed(image, on_bad=on_bad) == KEPT, name
    for name in ("65500x1", "1x65500", "1x1", "png 1x1"):
        assert processed(USABLE[name], short_side=1, min_shrink=1) == KEPT, name


@pytest.mark.parametrize("short_side", [None, 64])
@pytest.mark.parametrize(
    ("on_bad", "action"), [("fail", "failed"), ("skip", "skipped"), ("convert", "failed")]
)
def test_unusable_images(on_bad: str, action: str, short_side: int | None) -> None:
    converted = set()
    for name, (image, fault) in UNUSABLE.items():
        done = processed(image, on_bad=on_bad, short_side=short_side)
        assert fault in done.reason, name
        if done.action == "converted":
            converted.add(name)
            assert done.image is not None
            simplejpeg.decode_jpeg(done.image, strict=True)
        else:
            assert done == ProcessedImage(None, done.reason, action), name
    expected = {
        *("half", "no end mark", "last byte missing", "half with an end mark", "half zeros"),
        *("larger than its data", "smaller than its data", "odd sampling"),
        *("gif", "gif animated", "webp animated", "webp exif", "bmp 16 bits"),
        *("tiff", "tiff pages", "pnm"),
    }
    assert converted == (expected if on_bad == "convert" else set())


def test_a_cut_image_keeps_what_is_there() -> None:
    jpeg = encoded(photo(), "JPEG", quality=95)
    done = processed(jpeg[: len(jpeg) // 2], on_bad="convert")
    top = photo().height // 3
    pixels = pixels_of(done)
    assert np.abs(pixels[:top] - np.asarray(photo(), np.int16)[:top]).mean() < 3
    assert done.reason.startswith("cut short (no end-of-image mark); ")
    lost = int(done.reason.split("; ")[1].removesuffix("% is blank"))
    assert lost == pytest.approx(100 * (pixels == pixels[-1, -1]).all(axis=2).mean(), abs=6)
    assert 20 < lost < 80
    whole = processed(jpeg[:-2], on_bad="convert")
    assert whole.reason == "cut short (no end-of-image mark)"
    assert difference(whole, photo()) < 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("PNG", "a PNG named .JPEG"),
        ("WEBP", "a WebP named .JPEG"),
        ("BMP", "a BMP named .JPEG"),
        ("GIF", "GIF, which DALI cannot decode"),
        ("TIFF", "TIFF, which DALI cannot always decode"),
        ("PPM", "PNM, which DALI cannot always decode"),
    ],
)
def test_other_formats_become_jpeg(kind: str, reason: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(photo(), kind, **options)
    done = processed(image, on_bad="convert")
    assert done == ProcessedImage(done.image, reason, "converted")
    shown = Image.open(io.BytesIO(image)).convert("RGB")
    assert difference(done, shown) < 4  # the dots of a GIF's colors do not compress well


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_the_first_of_several_images_is_taken(kind: str) -> None:
    frames = [photo(), photo().rotate(180)]
    image = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=9)
    done = processed(image, on_bad="convert", short_side=64)
    assert done.reason.endswith("decode; the first of its images is taken")
    assert pixels_of(done).shape == (64, 85, 3)
    assert difference(done, shrunk(frames[0])) < 4
    cut = processed(image[: len(image) // 4], on_bad="convert")
    assert (cut.image, cut.action) == (None, "failed")
    assert "; OpenCV cannot decode this" in cut.reason


def test_too_many_pixels_are_not_decoded() -> None:
    gif = b"GIF89a" + (20_000).to_bytes(2, "little") * 2 + encoded(photo(), "GIF")[10:]
    code = (
        "from mpl_fast.packing.write.pixels import *; import sys; decode(sys.stdin.buffer.read())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=gif, capture_output=True, check=False)
    assert b"OpenCV cannot decode this GIF" in done.stderr


def test_a_png_by_its_own_name_is_kept() -> None:
    assert processed(USABLE["png"], "a.PNG", on_bad="convert") == KEPT
    assert processed(USABLE["png"], "a.jpg", on_bad="convert").reason == "a PNG named .jpg"
    assert processed(JPEG, "a.png", on_bad="convert") == KEPT


@pytest.mark.parametrize("name", ["cmyk", "ycck"])
def test_cmyk_becomes_rgb(name: str) -> None:
    done = processed(USABLE[name], on_bad="convert")
    assert (done.reason, done.action) == (f"a {name.upper()} JPEG", "converted")
    assert done.image is not None
    assert simplejpeg.decode_jpeg_header(done.image)[2] == "YCbCr"
    if name == "cmyk":  # the YCCK mark gives the other file other colors than the picture
        assert difference(done, photo()) < 3


def test_made_smaller() -> None:
    jpeg = encoded(photo(150, 203), "JPEG", quality=95)
    done = processed(jpeg, short_side=64)
    assert done == ProcessedImage(done.image)
    assert pixels_of(done).shape == (64, 87, 3)
    assert difference(done, shrunk(photo(150, 203))) < 3
    assert pixels_of(processed(USABLE["12 MP"], short_side=64)).shape == (64, 85, 3)
    assert pixels_of(processed(ARITHMETIC, short_side=8)).shape == (8, 12, 3)
    odd = processed(ODD_SAMPLING, on_bad="convert")
    assert difference(odd, Image.open(io.BytesIO(ODD_SAMPLING))) < 6


@pytest.mark.parametrize(("height", "width"), [(321, 489), (489, 321), (161, 243), (85, 83)])
def test_no_shift_of_pixels(height: int, width: int) -> None:
    """The decoder rounds up sizes that are not multiples of 8, 4 or 2 pixels."""
    grays = np.add.outer(np.linspace(20, 120, height), np.linspace(0, 115, width))
    jpeg = encoded(Image.fromarray(grays.round().astype(np.uint8)), "JPEG", quality=98)
    pixels = pixels_of(processed(jpeg, short_side=40, quality=98))
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
    image = encoded(photo(short, short + 40), "JPEG")
    done = processed(image, short_side=side, min_shrink=min_shrink)
    if smaller:
        assert pixels_of(done).shape == (side, round((short + 40) * side / short), 3)
    else:
        assert done == KEPT


@pytest.mark.parametrize("on_bad", ["fail", "convert"])
def test_other_kinds_are_made_smaller_without_alpha(on_bad: str) -> None:
    gray = photo().convert("L")
    cases = {
        **dict.fromkeys(("png", "png rgba", "png 16 bit"), photo()),
        **dict.fromkeys(("bmp", "bmp from top to bottom", "bmp of OS/2"), photo()),
        **dict.fromkeys(("webp", "webp lossless", "webp alpha"), photo()),
        **dict.fromkeys(("png gray", "png gray alpha"), gray),
    }
    for name, picture in cases.items():
        done = processed(USABLE[name], "a.png", on_bad=on_bad, short_side=64)
        assert done == ProcessedImage(done.image)
        assert difference(done, shrunk(picture)) < 3, name


def test_converted_and_made_smaller() -> None:
    how: dict[str, Any] = {"short_side": 64, "on_bad": "convert"}
    gif = processed(encoded(photo(), "GIF"), quality=50, **how)
    cmyk = processed(USABLE["cmyk"], quality=50, **how)
    assert (gif.action, cmyk.action) == ("converted", "converted")
    assert pixels_of(gif).shape == pixels_of(cmyk).shape == (64, 85, 3)
    better = processed(USABLE["cmyk"], quality=95, **how)
    assert len(cmyk.image or b"") < len(better.image or b"")


@pytest.mark.parametrize("check", ["header", "none"])
def test_damage_is_found_where_an_image_is_made_smaller(check: str) -> None:
    cut = JPEG[:-200] + b"\xff\xd9"
    assert processed(cut, check=check) == KEPT
    done = processed(cut, check=check, short_side=64)
    assert (done.image, done.action) == (None, "failed")
    assert "premature end of data segment" in done.reason


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_dropped_and_reported(order: str) -> None:
    plain = processed(JPEG, short_side=64)
    for value in range(10):
        turned = oriented(JPEG, value, order)
        expected = value if 1 <= value <= 8 else 1
        assert orientation(turned) == orientation(memoryview(turned)) == expected
        done = processed(turned, short_side=64)
        assert done == plain._replace(rotated=expected != 1)
        assert processed(turned) == KEPT
    assert orientation(plain.image or b"") == 1


def test_orientation_in_odd_headers() -> None:
    for tiff in (
        *(b"", b"II", b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\xff\xff"),
        *(b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01"),
    ):
        image = with_exif(JPEG, tiff)
        assert orientation(image) == 1
        assert processed(image, short_side=64) == processed(JPEG, short_side=64)
    turned = oriented(JPEG, 6)
    found = [orientation(memoryview(turned[:size])) for size in range(60)]  # cut headers
    assert found == sorted(found)
    assert set(found) == {1, 6}
    other_segments = b"\xff\xff\xfe\x00\x06Exif" + b"\xff\xe1\x00\x0ahttp://x"
    assert orientation(turned[:2] + other_segments + turned[2:]) == 6


def test_better_quality_is_closer() -> None:
    low, middle, high = (
        difference(processed(USABLE["png"], short_side=64, quality=quality), shrunk(photo()))
        for quality in (5, 50, 95)
    )
    assert low > 2 * middle > 2 * high


def test_photographs_look_the_same(shared_data: Path) -> None:
    with tarfile.open(shared_data / "imagenet-1000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")][::100]
        assert len(members) >= 10
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            image = file.read()
            expected = shrunk(Image.open(io.BytesIO(image)), 128)
            done = processed(image, member.name, short_side=128, quality=95)
            error = pixels_of(done) - np.asarray(expected, np.int16)
            assert np.abs(error.mean(axis=(0, 1))).max() < 1, member.name
            assert np.abs(error).mean() < 8, member.name


def test_description_for_the_manifest() -> None:
    plain = {"mode": "pass-through", "exif_orientation": "not applied"}
    assert describe_processing(ImageOptions()) == plain
    small = describe_processing(ImageOptions(short_side=480, quality=92, min_shrink=1.2))
    assert str(small.pop("libjpeg-turbo"))[0].isdigit()
    expected = {
        "mode": "short-side",
        "short_side": 480,
        "min_shrink": 1.2,
        "quality": 92,
        "converted_quality": 95,
        "simplejpeg": simplejpeg.__version__,
        "cv2": cv2.__version__,
        "exif_orientation": "not applied; dropped where re-encoded",
    }
    assert small.items() >= expected.items()
    assert describe_processing(ImageOptions(on_bad="convert"))["mode"] == "pass-through"


@pytest.mark.parametrize(
    ("options", "errors"),
    [
        ({}, []),
        ({"short_side": 1, "quality": 1, "min_shrink": 1}, []),
        ({"check": "deep"}, ["--check"]),
        ({"on_bad": "ask"}, ["--on-bad"]),
        ({"on_bad": "convert", "check": "header"}, ["--on-bad convert needs --check decode"]),
        ({"short_side": 0}, ["--short-side"]),
        ({"quality": 0}, ["--quality 0"]),
        ({"quality": 101}, ["--quality 101"]),
        ({"min_shrink": 0.9}, ["--min-shrink 0.9"]),
        ({"min_shrink": float("nan")}, ["--min-shrink nan"]),
        ({"min_shrink": float("inf")}, ["--min-shrink inf"]),
        ({"check": "x", "on_bad": "y", "short_side": -1, "quality": 0}, ["--"] * 4),
    ],
)
def test_bad_options(options: dict[str, Any], errors: list[str]) -> None:
    lines = image_option_errors(ImageOptions(**options))
    assert len(lines) == len(errors)
    assert all(line.startswith(start) for line, start in zip(lines, errors, strict=True))
