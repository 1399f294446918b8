"""Which files are images: those with a known suffix, and those that begin as an image does."""

import re

# Files with these are listed without being opened.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff"),
)
PEEKED = 256  # first bytes of a file that are enough for kind_of
_MARKS = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    # "BM" alone begins texts, too; behind the first header is the size of the second.
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "PNM": re.compile(rb"P[56](\s|#[^\n]*\n)+\d+\s+\d+\s+(255|65535)\s"),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "HEIC": re.compile(rb"....ftyp(hei[cmsx]|hev[cx]|mif1|msf1)", re.DOTALL),
}


def kind_of(image: bytes | memoryview) -> str:
    """Return the kind of an image according to its first bytes, "" if it is none."""
    return next((kind for kind, mark in _MARKS.items() if mark.match(image)), "")
