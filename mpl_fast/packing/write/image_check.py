"""Checks that image files can be decoded: DALI stops a training run at one that cannot."""

import re

from mpl_fast.packing.write.pixels import PixelsError, check_jpeg, decode, kind_of

_EMPTY, _UNKNOWN = "empty file", "neither JPEG nor PNG"
NO_IMAGE = (_EMPTY, _UNKNOWN)  # faults of files of which nothing can be decoded
_JPEG_END = re.compile(rb"\xff\xd9")
_PNG_END = re.compile(rb"IEND")
_TAIL = 64  # bytes; most files have their end mark in the last ones


def find_fault(image: bytes | memoryview, how: str) -> str | None:
    """Return why an image file cannot be used, or None.

    how is "decode" (decode all of it strictly), "header" (check the first bytes and search an end
    mark, which may be that of a thumbnail, so truncation can be missed) or "none" (not empty).
    JPEG and PNG are distinguished by content, not name: ImageNet has a PNG named .JPEG.
    """
    if not image:
        return _EMPTY
    if how == "none":
        return None
    kind = kind_of(image)
    if kind not in ("JPEG", "PNG"):
        return f"{_UNKNOWN} but {kind}" if kind else _UNKNOWN
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


def explain(image: bytes | memoryview, error: PixelsError) -> str:
    """Return why a JPEG or PNG cannot be decoded: truncation if its end is missing, else error."""
    return _missing_end(image, kind_of(image)) or str(error)


def _missing_end(image: bytes | memoryview, kind: str) -> str | None:
    mark = _JPEG_END if kind == "JPEG" else _PNG_END
    if mark.search(image[-_TAIL:]) or mark.search(image):  # no copy of a memoryview
        return None
    what = "end-of-image mark" if kind == "JPEG" else "IEND chunk"
    return f"cut short (no {what})"
