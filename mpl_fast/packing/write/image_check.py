"""Checks that DALI can decode an image file: it stops a training run at one that it cannot."""

import re

from mpl_fast.packing.image_kinds import kind_of
from mpl_fast.packing.write.pixels import (
    PIXEL_LIMIT,
    PixelsError,
    check_jpeg,
    declared_pixels,
    decode,
)

_EMPTY, _UNKNOWN = "empty file", "no image by its first bytes"
NO_IMAGE = (_EMPTY, _UNKNOWN)  # faults of files of which nothing can be decoded
_JPEG_END = re.compile(rb"\xff\xd9")
_PNG_END = re.compile(rb"IEND")
_TAIL = 64  # bytes; most files have their end mark in the last ones
_NEVER, _NOT_ALWAYS = "which DALI cannot decode", "which DALI cannot always decode"
_UNFIT = {  # measured with DALI 2.4: docs/packing.md, "Images"
    **dict.fromkeys(("GIF", "AVIF", "HEIC"), _NEVER),
    **dict.fromkeys(("TIFF", "PNM", "JPEG 2000"), _NOT_ALWAYS),
}
_ANIMATION, _EXIF = 2, 8  # flags of an extended WebP


def find_fault(image: bytes | memoryview, how: str) -> str | None:
    """Return why an image file cannot be used, or None.

    how is "decode" (decode all of it strictly), "header" (check the first bytes and search an end
    mark, which may be that of a thumbnail, so truncation can be missed) or "none" (not empty).
    Kinds are distinguished by content, not name: ImageNet has a PNG named .JPEG.
    """
    if not image:
        return _EMPTY
    if how == "none":
        return None
    if unfit := find_unfit(image) or too_many_pixels(image):
        return unfit
    kind = kind_of(image)
    if how == "header":
        return _missing_end(image, kind)
    try:
        if kind == "JPEG":
            check_jpeg(image)
        else:
            decode(image)
    except PixelsError as error:
        return explain(image, error)
    return None


def too_many_pixels(image: bytes | memoryview, most: int = PIXEL_LIMIT) -> str:
    """Return the fault of an image that would take more memory than is given to one, by the size
    in its header: a file of a few bytes can decode to gigabytes; else ""."""
    height, width = declared_pixels(image)
    return f"{width} x {height} pixels are more than {most}" if height * width > most else ""


def find_unfit(image: bytes | memoryview) -> str:
    """Return why DALI decodes no image of this kind, or not all of them; else ""."""
    kind = kind_of(image)
    if kind == "WebP" and image[12:16] == b"VP8X":
        flags = int.from_bytes(image[20:21], "little")
        if flags & _ANIMATION:
            return f"animated WebP, {_NOT_ALWAYS}"
        if flags & _EXIF:
            return f"WebP with EXIF data, {_NEVER}"
    if kind == "BMP" and image[14] != 12 and image[28:30] == b"\x10\0":
        return f"BMP of 16 bits a pixel, {_NOT_ALWAYS}"
    if kind in _UNFIT:
        return f"{kind}, {_UNFIT[kind]}"
    return "" if kind else _UNKNOWN


def explain(image: bytes | memoryview, error: PixelsError) -> str:
    """Return why an image cannot be decoded: truncation if its end is missing, else error."""
    return _missing_end(image, kind_of(image)) or str(error)


def _missing_end(image: bytes | memoryview, kind: str) -> str | None:
    if kind == "WebP":
        size = 8 + int.from_bytes(image[4:8], "little")
        return f"cut short ({len(image)} of {size} bytes)" if len(image) < size else None
    if kind not in ("JPEG", "PNG"):
        return None
    mark = _JPEG_END if kind == "JPEG" else _PNG_END
    if mark.search(image[-_TAIL:]) or mark.search(image):  # no copy of a memoryview
        return None
    what = "end-of-image mark" if kind == "JPEG" else "IEND chunk"
    return f"cut short (no {what})"
