"""Decodes image files, strictly or as far as possible, and encodes JPEG.

Pixels are (height, width, 3) uint8 in OpenCV's order, blue first, or (height, width, 1) for gray.
Alpha is dropped, 16 bits become 8, and an EXIF orientation is not applied; but the colors
of a TIFF are multiplied by its alpha, and its orientation is applied.
"""

import os
import re
import struct
import zlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from mpl_fast.packing.image_kinds import kind_of
from mpl_fast.packing.write import jpeg_segments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIXEL_LIMIT = 1 << 28  # of one image; as RGB that is 805 MB
_PNM_SIZE = re.compile(rb"P[56](?:\s|#[^\n]*\n)+(\d{1,9})\s+(\d{1,9})\s")
# OpenCV reads it when it is imported, wherever that is.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(PIXEL_LIMIT))
_PNG_HEADER = struct.Struct(">8s4x4sIIBB")  # mark, chunk type, width, height, bits, color type
_GRAY_PNG = (0, 4)  # color types: gray, gray with alpha


class PixelsError(Exception):
    """An image cannot be decoded or encoded, for the reason in its one-line text."""


class _TooManyPixelsError(PixelsError):
    """An image is too large to be decoded safely."""


class Shape(NamedTuple):
    """Size and color of an image according to its header."""

    height: int
    width: int
    color: str  # "Gray", "CMYK", "YCCK" or another


def declared_pixels(image: bytes | memoryview) -> tuple[int, int]:
    """Return the height and width in the header of an image, which need not be true; 0, 0 of a
    damaged one, and of TIFF, JPEG 2000, AVIF and HEIC, whose headers OpenCV compares with
    `PIXEL_LIMIT` before it decodes them."""
    kind = kind_of(image)
    if kind == "JPEG":
        return jpeg_segments.declared_size(image)
    if kind == "GIF":
        return _number(image[8:10]), _number(image[6:8])
    if kind == "PNM" and (found := _PNM_SIZE.match(image)):
        return int(found[2]), int(found[1])
    shape_of = {"PNG": _png_shape, "WebP": _webp_shape, "BMP": _bmp_shape}.get(kind)
    try:
        return shape_of(image)[:2] if shape_of else (0, 0)
    except PixelsError:
        return 0, 0


def read_shape(image: bytes | memoryview) -> Shape:
    """Return the stored size and color of a JPEG, PNG, WebP or BMP.

    Raises PixelsError when its header is damaged.
    """
    shape_of = {"PNG": _png_shape, "WebP": _webp_shape, "BMP": _bmp_shape}.get(kind_of(image))
    if shape_of:
        shape = shape_of(image)
    else:
        import simplejpeg  # late, as all imports here: --help must not wait for it

        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError as error:
            reason = "damaged JPEG header, or an unusual subsampling of colors"
            raise PixelsError(f"{reason} ({_one_line(error)})") from error
        shape = Shape(height, width, color)
    if shape.height * shape.width > PIXEL_LIMIT:
        size = f"{shape.width} x {shape.height}"
        raise _TooManyPixelsError(f"{size} pixels are more than {PIXEL_LIMIT}")
    return shape


def check_jpeg(image: bytes | memoryview) -> None:
    """Decode a JPEG strictly; PixelsError when anything in it is damaged.

    It is decoded at 1/8 of its size, without color where it has its brightness apart: that reads
    all compressed data in 2/3 of the time.
    """
    color = "GRAY" if read_shape(image).color in ("YCbCr", "Gray") else "BGR"
    _decode_jpeg(image, (1, 1), color, strict=True)


def decode(
    image: bytes | memoryview, size: tuple[int, int] | None = None, *, strict: bool = True
) -> "NDArray[np.uint8]":
    """Return the pixels of an image file, reduced to size (height, width) if it is given.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if that is still at least size. If not strict, a damaged
    image is decoded as far as possible, and the rest is gray or black. Raises PixelsError when the
    image cannot be decoded.
    """
    kind = kind_of(image)
    if not kind:
        raise PixelsError("no image that can be read here")
    if kind == "JPEG":
        try:
            return _decode_any_jpeg(image, size, strict=strict)
        except _TooManyPixelsError:
            raise
        except PixelsError:
            if strict:
                raise  # else try OpenCV, which supports every subsampling of colors
    if kind == "PNG" and strict:
        _check_chunks(image)
    pixels = _decode_with_opencv(image, gray=kind == "PNG" and read_shape(image).color == "Gray")
    return pixels if size is None else shrink(pixels, size)


def has_frames(image: bytes | memoryview) -> bool:
    """Return whether a file has a second image: another frame or page."""
    import numpy as np

    cv2 = _opencv()
    try:
        content = np.frombuffer(image, np.uint8)
        _, frames = cv2.imdecodemulti(content, cv2.IMREAD_COLOR, range=(0, 2))
    except cv2.error:
        return False
    return len(frames) > 1


def shrink(
    pixels: "NDArray[np.uint8]", size: tuple[int, int], full: tuple[float, float] | None = None
) -> "NDArray[np.uint8]":
    """Return pixels area-averaged to a smaller size (height, width).

    full is the exact height and width of the image in these pixels: of a JPEG decoded at 1/2, the
    last row may be half outside the image.
    """
    import numpy as np

    height, width = size
    full_height, full_width = full or pixels.shape[:2]
    cv2 = _opencv()
    scales = {"fx": width / full_width, "fy": height / full_height}
    smaller = cv2.resize(pixels, None, **scales, interpolation=cv2.INTER_AREA)
    # A partial row or column can make the result one too large.
    return np.ascontiguousarray(smaller[:height, :width]).reshape(height, width, -1)


def encode(pixels: "NDArray[np.uint8]", quality: int) -> bytes:
    """Return pixels as a baseline JPEG with 4:2:0 chroma subsampling, without metadata."""
    import simplejpeg

    color, sampling = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("BGR", "420")
    try:
        encoded: bytes = simplejpeg.encode_jpeg(
            pixels, quality=quality, colorspace=color, colorsubsampling=sampling
        )
    except ValueError as error:
        height, width, _ = pixels.shape
        raise PixelsError(f"{width} x {height} pixels: {_one_line(error)}") from error
    return encoded


def _decode_any_jpeg(
    image: bytes | memoryview, size: tuple[int, int] | None, *, strict: bool
) -> "NDArray[np.uint8]":
    shape = read_shape(image)
    factor = 1 if size is None else _factor(shape, size)
    scaled = -(-shape.height // factor), -(-shape.width // factor)
    if shape.color in ("CMYK", "YCCK"):
        pixels = _decode_inks(image, scaled, strict=strict)
    else:
        color = "GRAY" if shape.color == "Gray" else "BGR"
        pixels = _decode_jpeg(image, scaled, color, strict=strict)
    if size is None:
        return pixels
    return shrink(pixels, size, (shape.height / factor, shape.width / factor))


def _decode_inks(
    image: bytes | memoryview, size: tuple[int, int], *, strict: bool
) -> "NDArray[np.uint8]":
    """Return the RGB pixels of a CMYK JPEG, with DALI's formula color * black / 255."""
    import numpy as np

    passing = _decode_jpeg(image, size, "CMYK", strict=strict)
    if not jpeg_segments.has_adobe_mark(image):
        passing = ~passing
    color, black = passing[..., 2::-1].astype(np.uint16), passing[..., 3:]
    return (color * black // 255).astype(np.uint8)


def _factor(shape: Shape, size: tuple[int, int]) -> int:
    """Return the largest of 8, 4, 2 and 1 by which shape can be divided and still be >= size.

    libjpeg-turbo also has 8/3, 8/5, .. but only powers of two are fast.
    """
    fits = min(shape.height // size[0], shape.width // size[1])
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(fits, 1))


def _decode_jpeg(
    image: bytes | memoryview, size: tuple[int, int], color: str, *, strict: bool
) -> "NDArray[np.uint8]":
    import simplejpeg

    height, width = size
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            image, colorspace=color, min_height=height, min_width=width, strict=strict
        )
    except (ValueError, MemoryError) as error:
        raise PixelsError(_one_line(error)) from error
    return pixels


def _decode_with_opencv(image: bytes | memoryview, *, gray: bool) -> "NDArray[np.uint8]":
    import numpy as np

    cv2 = _opencv()
    flags = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR
    try:
        content = np.frombuffer(image, np.uint8)
        pixels = cv2.imdecode(content, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        fault = f"OpenCV cannot decode this {kind_of(image)} ({error.err})"
        raise PixelsError(fault) from error
    if pixels is None:
        raise PixelsError(f"OpenCV cannot decode this {kind_of(image)}")
    decoded: NDArray[np.uint8] = pixels.reshape(*pixels.shape[:2], -1)
    return decoded


def _png_shape(image: bytes | memoryview) -> Shape:
    if len(image) < _PNG_HEADER.size:
        raise PixelsError("cut short (no IHDR chunk)")
    _, kind, width, height, _, color = _PNG_HEADER.unpack_from(image)
    if kind != b"IHDR":
        raise PixelsError("damaged PNG (no IHDR chunk)")
    return Shape(height, width, "Gray" if color in _GRAY_PNG else "RGB")


def _webp_shape(image: bytes | memoryview) -> Shape:
    size, kind = image[20:30], bytes(image[12:16])
    if kind == b"VP8X":
        width, height = _number(size[4:7]) + 1, _number(size[7:10]) + 1
    elif kind == b"VP8L":
        bits = _number(size[1:5])
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = _number(size[6:8]) & 0x3FFF, _number(size[8:10]) & 0x3FFF
    return Shape(height, width, "RGB")


def _bmp_shape(image: bytes | memoryview) -> Shape:
    if image[14] == 12:  # OS/2's header
        return Shape(_number(image[20:22]), _number(image[18:20]), "RGB")
    height = int.from_bytes(image[22:26], "little", signed=True)  # negative: from top to bottom
    return Shape(abs(height), _number(image[18:22]), "RGB")


def _number(content: bytes | memoryview) -> int:
    return int.from_bytes(content, "little")


def _check_chunks(image: bytes | memoryview) -> None:
    """Check the chunk checksums of a PNG, which OpenCV ignores or only warns about."""
    position = 8
    kind = b""
    while kind != b"IEND":
        size = int.from_bytes(image[position : position + 4], "big")
        body = image[position + 4 : position + 8 + size]
        kind = bytes(body[:4])
        checksum = image[position + 8 + size : position + 12 + size]
        if len(body) != size + 4 or checksum != zlib.crc32(body).to_bytes(4, "big"):
            raise PixelsError(f"damaged PNG chunk at byte {position}")
        position += 12 + size


@cache
def _opencv() -> ModuleType:
    """Return OpenCV limited to one thread, since every core has a worker already."""
    import cv2

    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are reported here
    return cv2


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
