"""Reads JPEG header segments: the size, EXIF orientation and the Adobe marker."""

import re
import struct
from collections.abc import Iterator

_APP1, _APP14, _START_OF_SCAN = 0xE1, 0xEE, 0xDA  # second byte of a marker
# Markers that begin with the size of the image: one for each kind of compression.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_FILL = re.compile(rb"\xff+")  # a marker may be preceded by any number of these
_MARKER = struct.Struct(">BBH")  # 0xff, its second byte, and the length of what follows with itself
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # tag
_ENTRY = "HHIH"  # tag, type, count, and the value where it is a short


def orientation(image: bytes | memoryview) -> int:
    """Return the EXIF orientation of a JPEG, 1 to 8; 1 if it is missing or damaged."""
    for marker, start, end in _segments(image):
        if marker == _APP1 and image[start : start + len(_EXIF)] == _EXIF:
            return _tiff_orientation(bytes(image[start + len(_EXIF) : end]))
    return 1


def declared_size(image: bytes | memoryview) -> tuple[int, int]:
    """Return the height and width of a JPEG, the largest if there are several; 0, 0 if none."""
    sizes = [
        (
            int.from_bytes(image[start + 1 : min(start + 3, end)], "big"),
            int.from_bytes(image[start + 3 : min(start + 5, end)], "big"),
        )
        for marker, start, end in _segments(image)
        if marker in _FRAMES
    ]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def has_adobe_mark(image: bytes | memoryview) -> bool:
    """Return whether a JPEG has an Adobe marker: such CMYK images are stored inverted."""
    return any(
        marker == _APP14 and image[start : min(start + 5, end)] == b"Adobe"
        for marker, start, end in _segments(image)
    )


def _segments(image: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield (second byte of the marker, start and end of the content) up to the compressed data or
    to damage; the end may be behind that of the image."""
    position, last = 2, len(image) - _MARKER.size
    while position <= last:
        first, marker, length = _MARKER.unpack_from(image, position)
        if first != 0xFF or marker == _START_OF_SCAN:
            return
        if marker == 0xFF and (fill := _FILL.match(image, position)):
            position = fill.end() - 1
            continue
        start, end = position + 4, position + 2 + length
        yield marker, start, end
        position = end if end > start else start


def _tiff_orientation(tiff: bytes) -> int:
    """Read the tag from the first directory of a TIFF header."""
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if byte_order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(byte_order + "I", tiff, 4)
        (entries,) = struct.unpack_from(byte_order + "H", tiff, directory)
        for entry in range(entries):
            place = directory + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(byte_order + _ENTRY, tiff, place)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # an offset outside the segment
        pass
    return 1
