"""DALI decodes every image that passes the check, to the same pixels."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from mpl_fast.packing.write.image_check import find_fault
from mpl_fast.packing.write.pixels import PixelsError, check_jpeg, decode, read_shape
from tests.packing.hazard_images import UNUSABLE, USABLE, chunks_of, png_of


def decoded_by_dali(images: Sequence[bytes]) -> list[NDArray[np.uint8]]:
    """Return the RGB of each, also cropped as in training; raises at the first that fails."""
    following = iter(images)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        image = fn.external_source(
            lambda: [np.frombuffer(next(following), np.uint8)], dtype=types.UINT8, ndim=1
        )
        whole = fn.decoders.image(image, device="cpu", adjust_orientation=False)
        crop = fn.decoders.image_random_crop(image, device="cpu", adjust_orientation=False)
        pipeline.set_outputs(whole, crop)
    pipeline.build()
    return [np.array(pipeline.run()[0].at(0)) for _ in images]


@pytest.fixture(scope="module")
def by_dali() -> dict[str, NDArray[np.uint8]]:
    return dict(zip(USABLE, decoded_by_dali(list(USABLE.values())), strict=True))


@pytest.mark.parametrize("name", USABLE)
def test_usable_images_pass(name: str, by_dali: dict[str, NDArray[np.uint8]]) -> None:
    image = USABLE[name]
    assert find_fault(image, "decode") is None
    assert find_fault(memoryview(image), "header") is None
    pixels = decode(memoryview(image))[..., ::-1]
    assert read_shape(memoryview(image))[:2] == pixels.shape[:2]
    assert np.array_equal(np.broadcast_to(pixels, by_dali[name].shape), by_dali[name])


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images_are_refused(name: str) -> None:
    image, part = UNUSABLE[name]
    assert part in str(find_fault(memoryview(image), "decode"))


@pytest.mark.parametrize(
    ("name", "how", "fault"),
    [
        ("empty", "header", "empty file"),
        ("half", "header", "cut short (no end-of-image mark)"),
        ("png half", "header", "cut short (no IEND chunk)"),
        ("gif", "header", "GIF, which DALI cannot decode"),
        ("text", "header", "no image by its first bytes"),
        ("half with an end mark", "header", None),  # all that this check does not see
        ("png bit flip", "header", None),
        ("empty", "none", "empty file"),
        ("text", "none", None),
    ],
)
def test_lenient_checks(name: str, how: str, fault: str | None) -> None:
    image, _ = UNUSABLE[name]
    assert find_fault(image, how) == find_fault(memoryview(image), how) == fault


def damaged(image: bytes, random: np.random.Generator) -> bytes:
    """Return image with some bytes changed, lost, added or cleared, or cut off."""
    content = bytearray(image)
    most = len(content) if random.random() < 0.5 else min(700, len(content))  # or in the header
    place = int(random.integers(2, most))
    size = int(random.integers(1, 64))
    way = random.integers(5)
    if way == 0:
        content[place] ^= 1 << int(random.integers(8))
    elif way == 1:
        del content[place : place + size]
    elif way == 2:
        content[place:place] = random.bytes(size)
    elif way == 3:
        content[place : place + size] = bytes(len(content[place : place + size]))
    else:
        content[place:] = b"\xff\xd9"
    return bytes(content)


def damaged_png(image: bytes, random: np.random.Generator) -> bytes:
    """Return image with a bit flipped in a chunk whose checksum is right."""
    chunks = chunks_of(image)
    row = int(random.integers(len(chunks) - 1))
    content = bytearray(chunks[row][1])
    content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    chunks[row] = chunks[row][0], bytes(content)
    return png_of(chunks)


def test_dali_decodes_whatever_passes() -> None:
    random = np.random.default_rng(0)
    jpegs = ["jpeg", "progressive", "gray", "restart markers", "cmyk", "arithmetic", "exif 6"]
    pngs = ["png", "png palette alpha", "png gray alpha", "png 16 bit", "png with exif"]
    images = [damaged(USABLE[name], random) for name in jpegs for _ in range(100)]
    images += [damaged_png(USABLE[name], random) for name in pngs for _ in range(40)]
    passed = [image for image in images if find_fault(image, "decode") is None]
    assert 50 < len(passed) < len(images) / 2
    others = [name for name in USABLE if name.startswith(("webp", "bmp"))]
    images = [damaged(USABLE[name][:1000], random) + USABLE[name][1000:] for name in others * 20]
    passed += (more := [image for image in images if find_fault(image, "decode") is None])
    assert 50 < len(more) < len(images)
    assert len(decoded_by_dali(passed)) == len(passed)


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("highest", [65535, 4095])
def test_16_bits_are_divided_by_257(layers: int, highest: int) -> None:
    """DALI rounds, OpenCV truncates; a file is not stretched to the values that it has."""
    values = np.linspace(0, highest, 1 << 16).round().astype(np.uint16).reshape(256, 256)
    image = cv2.imencode(".png", np.dstack([values] * layers))[1].tobytes()
    assert find_fault(image, "decode") is None
    for pixels in (decode(image), *decoded_by_dali([image])):
        assert np.abs(pixels - values[..., None] / 257).max() < 1
    tiff = cv2.imencode(".tiff", np.dstack([values] * layers))[1].tobytes()
    assert np.abs(decode(tiff) - values[..., None] / 257).max() < 1


def test_the_check_without_colors_finds_what_decoding_with_them_does() -> None:
    """Bits are flipped in sequential and progressive JPEGs, with and without restart marks."""
    chance, found = random.Random(0), Counter[bool]()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for progressive, restart in itertools.product((0, 1), (0, 4)):
        how = [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
        whole = cv2.imencode(".jpg", pixels, how)[1].tobytes()
        for _ in range(300):
            image = bytearray(whole)
            image[chance.randrange(2, len(image))] ^= 1 << chance.randrange(8)
            try:
                simplejpeg.decode_jpeg(bytes(image), colorspace="BGR", strict=True)
                right = True
            except ValueError:
                right = False
            found[right] += 1
            try:
                check_jpeg(bytes(image))
                assert right
            except PixelsError:
                assert not right
    assert min(found.values()) > 100
