"""Whether an image file can be decoded: DALI ends the whole run at one that cannot."""

import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


def find_fault(image: bytes, how: str) -> str | None:
    """Return why the bytes of an image file cannot be used, or None when they can.

    how is "decode" (every pixel, strictly), "header" (the first bytes, and an end mark somewhere:
    that of a thumbnail will do, so not every cut is seen) or "none" (not empty). The content
    decides between JPEG and PNG, not the name: ImageNet has a PNG that is named .JPEG.
    """
    if not image:
        return "empty file"
    if how == "none":
        return None
    if image.startswith(_JPEG):
        if b"\xff\xd9" not in image:
            return "cut short (no end-of-image mark)"
        return _jpeg_fault(image) if how == "decode" else None
    if image.startswith(_PNG):
        if b"IEND" not in image:
            return "cut short (no IEND chunk)"
        return _png_fault(image) if how == "decode" else None
    return "neither JPEG nor PNG"


def _jpeg_fault(image: bytes) -> str | None:
    import simplejpeg  # late: only workers decode

    try:
        simplejpeg.decode_jpeg(image, colorspace="RGB", strict=True)
    except (ValueError, MemoryError) as error:
        return _one_line(error)
    return None


def _png_fault(image: bytes) -> str | None:
    """Check the chunks' checksums, which OpenCV skips or only warns of, and then decode."""
    import cv2
    import numpy as np

    position = len(_PNG)
    kind = b""
    while kind != b"IEND":
        size = int.from_bytes(image[position : position + 4], "big")
        body = image[position + 4 : position + 8 + size]
        kind = body[:4]
        checksum = image[position + 8 + size : position + 12 + size]
        if len(body) != size + 4 or checksum != zlib.crc32(body).to_bytes(4, "big"):
            return f"damaged PNG chunk at byte {position}"
        position += 12 + size
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        return _one_line(error)
    return "OpenCV cannot decode this PNG" if pixels is None else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
