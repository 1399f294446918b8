"""SVHN's cropped digits as published: MATLAB files of version 5, read image by image."""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.sources.raw_pixels import pieces, png
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource
from mpl_fast.packing.write.pixels import PIXEL_LIMIT

_HEADER = 128  # bytes
_MATRIX, _COMPRESSED = 14, 15  # types of elements
# Types of the numbers in an element, as NumPy's.
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_READ = 1 << 20
_LABELS = 1 << 24  # more than published: 531,131
_DIGITS = tuple("0123456789")


class SvhnSource(UnpackedSource):
    """The images of a .mat file with X, pixels, and y, digits; as PNG."""

    suffixes = (".mat",)
    has_folders = False

    @classmethod
    def _unpack(cls, request: Request) -> Unpacked:
        return Unpacked((request.path,), _DIGITS, _images(request.path))


class _Variable(NamedTuple):
    """A variable of a .mat file."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Iterator[bytes]  # of its numbers; the first index varies fastest


def _images(path: Path) -> Iterator[tuple[int, str, bytes]]:
    try:
        yield from _read_images(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _read_images(path: Path) -> Iterator[tuple[int, str, bytes]]:
    import numpy as np

    with path.open("rb") as file:
        starts = _variables(file, path)
        if missing := {"X", "y"} - starts.keys():
            raise DataError(f"{path}: has no variable {min(missing)}, as SVHN's cropped digits do")
        sides, dtype, blocks = _variable(file, *starts["y"], path)
        if math.prod(sides) > _LABELS:
            raise DataError(f"{path}: damaged: y has the shape {sides}")
        labels = np.frombuffer(b"".join(blocks), dtype)
        shape, dtype, blocks = _variable(file, *starts["X"], path)
        if dtype != "u1" or len(shape) != 4 or shape[2] != 3 or min(shape) < 1:
            raise DataError(f"{path}: X is {dtype} {shape}, not uint8 (height, width, 3, images)")
        if shape[0] * shape[1] > PIXEL_LIMIT:
            raise DataError(f"{path}: damaged: images of {shape[0]} x {shape[1]} pixels")
        if len(labels) != shape[3] or not np.isin(labels, range(11)).all():
            raise DataError(f"{path}: y is not a digit, 1 to 10, for each of {shape[3]} images")
        height, width, colors, _ = shape
        images = pieces(blocks, height * width * colors)
        for row, label in enumerate(labels.tolist()):
            pixels = np.frombuffer(next(images), np.uint8).reshape(colors, width, height)
            # The label 10 is the digit 0.
            yield int(label) % 10, f"{path.stem}_{row:06d}.png", png(pixels.transpose(2, 1, 0))


def _variables(file: IO[bytes], path: Path) -> dict[str, tuple[int, int, int]]:
    """Return type, start and size of the element of each variable, by its name."""
    head = file.read(_HEADER)
    if head[:10] != b"MATLAB 5.0" or head[126:] != b"IM":
        fault = "is no MATLAB 5 file of little-endian numbers (in MATLAB: save -v7)"
        raise DataError(f"{path}: {fault}")
    found = {}
    at = _HEADER
    while tag := file.read(8):
        kind, size = _tag(tag, path)
        if kind in (_MATRIX, _COMPRESSED):
            stream = _Stream(file, kind, at + 8, size, path)
            found[_head_of(stream)[0]] = kind, at + 8, size
        at = file.seek(at + 8 + size)
    return found


def _variable(file: IO[bytes], kind: int, start: int, size: int, path: Path) -> _Variable:
    stream = _Stream(file, kind, start, size, path)
    _, shape = _head_of(stream)
    number, length, small = stream.tag()
    dtype = _NUMBERS.get(number)
    count = 1
    for side in shape:
        count *= side
    if dtype is None or length != count * int(dtype[-1]):
        raise DataError(f"{path}: damaged: {length} bytes of type {number} for numbers {shape}")
    blocks = iter((small,)) if small else stream.blocks(length)
    return _Variable(shape, dtype, blocks)


def _head_of(stream: "_Stream") -> tuple[str, tuple[int, ...]]:
    """Return name and shape of a matrix, whose numbers follow in the stream."""
    stream.element()  # flags
    shape = stream.sides()
    return stream.element().decode("latin1"), shape


def _tag(tag: bytes, path: Path) -> tuple[int, int]:
    if len(tag) < 8:
        raise DataError(f"{path}: cut short")
    kind, size = struct.unpack("<II", tag)
    return kind, size


class _Stream:
    """The content of one matrix, decompressed."""

    def __init__(self, file: IO[bytes], kind: int, start: int, size: int, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = size
        self._buffer = b""
        self._inflater = zlib.decompressobj() if kind == _COMPRESSED else None
        file.seek(start)
        if self._inflater:
            self.read(8)  # the tag of the matrix

    def read(self, size: int) -> bytes:
        """Return that many bytes; DataError if there are less."""
        while len(self._buffer) < size:
            self._buffer += self._more()
        content, self._buffer = self._buffer[:size], self._buffer[size:]
        return content

    def tag(self) -> tuple[int, int, bytes]:
        """Return type, size, and content (if it is in the tag) of the next element."""
        kind, size = struct.unpack("<II", self.read(8))
        if kind >> 16 > 4:
            raise DataError(f"{self._path}: damaged: {kind >> 16} bytes in a place of 4")
        if kind >> 16:
            return kind & 0xFFFF, kind >> 16, struct.pack("<I", size)[: kind >> 16]
        return kind, size, b""

    def element(self) -> bytes:
        """Return the content of the next element."""
        _, size, small = self.tag()
        if small or not size:
            return small
        if size > _READ:
            raise DataError(f"{self._path}: damaged: a head of {size} bytes")
        return self.read(size + -size % 8)[:size]

    def sides(self) -> tuple[int, ...]:
        """Return the next element as whole numbers."""
        content = self.element()
        if len(content) % 4:
            raise DataError(
                f"{self._path}: damaged: {len(content)} bytes for the sides of a matrix"
            )
        return struct.unpack(f"<{len(content) // 4}i", content)

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yield the next bytes in blocks."""
        while size:
            block = self.read(min(size, _READ))
            size -= len(block)
            yield block
        while self._inflater and not self._inflater.eof:
            self._more()  # up to its checksum

    def _more(self) -> bytes:
        if self._inflater and self._inflater.unconsumed_tail:
            stored = self._inflater.unconsumed_tail
        else:
            stored = self._file.read(min(self._left, _READ))
            self._left -= len(stored)
            if not stored:
                raise DataError(f"{self._path}: cut short")
        try:
            return self._inflater.decompress(stored, _READ) if self._inflater else stored
        except zlib.error as error:
            raise DataError(f"{self._path}: damaged ({error})") from error
