"""Processing of one image before it is packed: check, resize, convert, or reject."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpl_fast.packing.image_kinds import kind_of
from mpl_fast.packing.options import ACTIONS, ImageOptions
from mpl_fast.packing.write.image_check import explain, find_fault, find_unfit, too_many_pixels
from mpl_fast.packing.write.jpeg_segments import orientation
from mpl_fast.packing.write.pixels import (
    PixelsError,
    decode,
    encode,
    has_frames,
    read_shape,
    shrink,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONVERTED_QUALITY = 95  # of an image that is re-encoded for another reason than its size
_LOST_LIMIT = 0.9  # share of a damaged image that may be blank for the rest to be worth keeping
_JPEG_SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif")


class ProcessedImage(NamedTuple):
    """The result of processing one image."""

    image: bytes | None = None  # a new JPEG; None: the original bytes
    reason: str = ""  # for the action
    action: str = ""  # or "failed", "skipped" or "converted"
    rotated: bool = False  # an EXIF orientation other than 1, never applied, was dropped


def process_image(image: bytes | memoryview, name: str, how: ImageOptions) -> ProcessedImage:
    """Check and, depending on the options, resize or convert an image file called name.

    An undamaged image is decoded at most once: decoding it strictly for resizing is also its check,
    whatever how.check is. PNG, WebP, BMP and CMYK JPEG are accepted as they are, but "convert"
    makes RGB JPEGs of CMYK JPEG, of another kind named as JPEG, of one that DALI cannot always
    decode, and of the decodable rest of damaged images.
    """
    if large := too_many_pixels(image, how.max_pixels):  # nothing of it is decoded, to convert it
        skipped = how.on_bad == "skip"
        return ProcessedImage(None, large, ACTIONS["skip" if skipped else "fail"])
    try:
        oddity = _oddity(image, name) if how.on_bad == "convert" else ""
        size = _smaller_size(image, how)
        if size is None and not oddity:
            fault = find_fault(image, how.check)
            return _damaged(image, fault, how) if fault else ProcessedImage()
        quality = CONVERTED_QUALITY if size is None else how.quality
        return _reencoded(image, decode(image, size), quality, oddity)
    except PixelsError as error:
        return _damaged(image, explain(image, error), how)


def describe_processing(how: ImageOptions) -> dict[str, object]:
    """Return the manifest's entry: the same values mean the same bytes for an image."""
    if how.short_side is None and how.on_bad != "convert":
        return {"mode": "pass-through", "exif_orientation": "not applied"}
    import cv2  # late: --help must not wait for it
    import simplejpeg

    library = Path(simplejpeg._jpeg.__file__).read_bytes()  # its only record of the version
    turbo = re.search(rb"libjpeg-turbo version ([0-9.]+)", library)
    return {
        "mode": "pass-through" if how.short_side is None else "short-side",
        "short_side": how.short_side,
        "min_shrink": how.min_shrink,
        "quality": how.quality,
        "converted_quality": CONVERTED_QUALITY,
        "encoder": "simplejpeg, baseline 4:2:0; resized with cv2 INTER_AREA",
        "simplejpeg": simplejpeg.__version__,
        "libjpeg-turbo": turbo[1].decode() if turbo else "unknown",
        "cv2": cv2.__version__,
        "exif_orientation": "not applied; dropped where re-encoded",
    }


def _oddity(image: bytes | memoryview, name: str) -> str:
    """Return why some readers may fail on an image that can be decoded, or ""."""
    kind = kind_of(image)
    if find_unfit(image):
        return ""  # a fault
    if kind != "JPEG" and name.lower().endswith(_JPEG_SUFFIXES):
        return f"a {kind} named {Path(name).suffix}"
    if kind == "JPEG":
        color = read_shape(image).color
        if color in ("CMYK", "YCCK"):
            return f"a {color} JPEG"
    return ""


def _smaller_size(image: bytes | memoryview, how: ImageOptions) -> tuple[int, int] | None:
    """Return the (height, width) to reduce the stored pixels to, or None to keep them."""
    if how.short_side is None or find_unfit(image):
        return None
    shape = read_shape(image)
    return _shrunk(shape.height, shape.width, how)


def _shrunk(height: int, width: int, how: ImageOptions) -> tuple[int, int] | None:
    short = min(height, width)
    if how.short_side is None or short <= how.short_side or short / how.short_side < how.min_shrink:
        return None
    return round(height * how.short_side / short), round(width * how.short_side / short)


def _damaged(image: bytes | memoryview, reason: str, how: ImageOptions) -> ProcessedImage:
    """Reject an image with a fault, or convert what can be decoded of it."""
    action = ACTIONS[how.on_bad]
    if action == "converted":
        try:
            return _recovered(image, reason, how)
        except PixelsError as error:
            action = "failed"
            if kind_of(image) and str(error) != reason:
                reason = f"{reason}; {error}"
    return ProcessedImage(None, reason, action)


def _recovered(image: bytes | memoryview, reason: str, how: ImageOptions) -> ProcessedImage:
    """Return a new JPEG of what can be decoded; PixelsError if that is nothing."""
    pixels = decode(image, strict=False)
    height, width = pixels.shape[:2]
    if height * width > how.max_pixels:  # of a kind whose header only OpenCV reads
        raise PixelsError(f"{width} x {height} pixels are more than {how.max_pixels}")
    if kind_of(image) == "JPEG":
        reason = _with_lost_share(reason, pixels)
    elif has_frames(image):
        reason = f"{reason}; the first of its images is taken"
    size = _shrunk(len(pixels), len(pixels[0]), how)
    if size is None:
        return _reencoded(image, pixels, CONVERTED_QUALITY, reason)
    return _reencoded(image, shrink(pixels, size), how.quality, reason)


def _with_lost_share(reason: str, pixels: "NDArray[np.uint8]") -> str:
    """Add to reason the share of a damaged JPEG that is blank, as libjpeg leaves lost data."""
    lost = float((pixels == pixels[-1, -1]).all(axis=2).mean())
    if lost > _LOST_LIMIT:
        raise PixelsError("nothing is left of it")
    return f"{reason}; {lost:.0%} is blank" if lost > 0.01 else reason


def _reencoded(
    image: bytes | memoryview, pixels: "NDArray[np.uint8]", quality: int, reason: str
) -> ProcessedImage:
    """Return pixels as a new JPEG: a conversion if there is a reason, else only resized."""
    action = "converted" if reason else ""
    return ProcessedImage(encode(pixels, quality), reason, action, orientation(image) != 1)
