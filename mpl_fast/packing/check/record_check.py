"""Compares the bytes of a .rec file with the rows of the table, record by record.

Frame, header and padding of a record follow from its row; the image is compared by its CRC-32.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mpl_fast.data.records import HEAD_SIZE, MAGIC, frame, record_head, unframe
from mpl_fast.errors import DataError
from mpl_fast.packing.write.pool import Advance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 4 << 20  # bytes read at once; a longer record is read whole
_FRAME, _HEADER, _PADDING, _IMAGE = "frame", "header", "padding", "image"


class Fault(NamedTuple):
    row: int  # index into the rows of the shard
    text: str
    undecodable: bool = False  # its bytes are right, but they are no image


class ReadResult(NamedTuple):
    """The result of reading a file once."""

    sha256: str
    size: int  # bytes that could be read
    faults: list[Fault]
    error: str  # why the file could not be read to its end, else ""


class RecordReader:
    """Reads a file in blocks of complete records and compares each record with its row."""

    def __init__(self, rows: "NDArray[np.void]", size: int, advance: Advance) -> None:
        self._rows, self._advance = rows, advance
        self._reported = 0  # records reported to advance
        longest = int(rows["length"].max())
        self._view = memoryview(bytearray(min(size, max(_BLOCK, longest))))

    def read(self, stream: BinaryIO, *, images: bool, decode: bool) -> ReadResult:
        """Read as many bytes as the file should have, up to its end or a disk error."""
        digest = hashlib.sha256()
        faults: list[Fault] = []
        done = 0
        for first, last in self._blocks():
            wanted = int(self._rows["offset"][last - 1] + self._rows["length"][last - 1]) - done
            got, error = _fill(stream, self._view[:wanted])
            digest.update(self._view[:got])
            faults += self._faults(first, last, got, images, decode)
            done += got
            self._advance(*((last - first, got) if last > self._reported else (0, 0)))
            self._reported = max(self._reported, last)
            if got < wanted:
                faults += (Fault(row, "is missing") for row in range(last, len(self._rows)))
                return ReadResult(digest.hexdigest(), done, faults, error)
        return ReadResult(digest.hexdigest(), done, faults, "")

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of consecutive rows that fit into the buffer."""
        ends = self._rows["offset"] + self._rows["length"]
        first = 0
        while first < len(ends):
            limit = self._rows["offset"][first] + len(self._view)
            last = int(ends.searchsorted(limit, "right"))
            yield first, last
            first = last

    def _faults(
        self, first: int, last: int, got: int, images: bool, decode: bool
    ) -> Iterator[Fault]:
        """Yield the faults of the records in a block of which `got` bytes could be read."""
        rows = self._rows[first:last]
        starts = rows["offset"] - rows["offset"][0]
        whole = int((starts + rows["length"]).searchsorted(got, "right"))
        simple = (rows["length"] == whole_length(rows))[:whole]
        damaged = _around_the_image(self._view[:got], rows[:whole], starts[:whole])
        for at in range(whole) if images else (damaged.astype(bool) | ~simple).nonzero()[0]:
            start, row = int(starts[at]), rows[at]
            if not simple[at]:
                text = _parts_fault(bytes(self._view[start : start + int(row["length"])]), row)
            else:
                text = (_FRAME, _HEADER, _PADDING)[damaged[at] - 1] if damaged[at] else ""
                image = self._view[start + HEAD_SIZE : start + HEAD_SIZE + int(row["size"])]
                if not text and zlib.crc32(image) != row["crc32"]:
                    text = _IMAGE
            if text:
                yield Fault(first + int(at), f"its {text} is damaged")
            elif decode:
                yield from self._undecodable(first + int(at), start, bool(simple[at]))
        for at in range(whole, last - first):
            yield Fault(first + at, "is cut short" if starts[at] < got else "is missing")

    def _undecodable(self, at: int, start: int, simple: bool) -> Iterator[Fault]:
        from mpl_fast.packing.write.image_check import find_fault

        row = self._rows[at]
        if simple:
            image = self._view[start + HEAD_SIZE : start + HEAD_SIZE + int(row["size"])]
        else:
            framed = bytes(self._view[start : start + int(row["length"])])
            image = memoryview(unframe(framed))[HEAD_SIZE - 8 :]
        reason = find_fault(image, "decode")
        if reason:
            yield Fault(at, f"undamaged, but cannot be decoded: {reason}", undecodable=True)


def _around_the_image(
    view: memoryview, rows: "NDArray[np.void]", starts: "NDArray[np.int64]"
) -> "NDArray[np.uint8]":
    """Return 0 (undamaged), 1 (frame), 2 (header) or 3 (padding) for records of one part."""
    import numpy as np

    words = np.frombuffer(view, "<u4", len(view) // 4)
    at = starts // 4
    head = words[at[:, None] + np.arange(HEAD_SIZE // 4)]
    right = np.zeros_like(head)
    right[:, 0] = MAGIC
    right[:, 1] = rows["size"] + (HEAD_SIZE - 8)
    right[:, 3] = rows["label"].astype("<f4").view("<u4")
    right[:, 4] = rows["id"]
    different = head != right
    end = words[at + rows["length"] // 4 - 1].astype(np.uint64)
    used = 8 * (4 - -rows["size"] % 4).astype(np.uint64)  # bits of the last word
    return np.select(
        [different[:, :2].any(axis=1), different[:, 2:].any(axis=1), end >> used != 0], [1, 2, 3]
    ).astype(np.uint8)


def _parts_fault(framed: bytes, row: "np.void") -> str:
    """Return which part of a multi-part record is damaged, or ""."""
    try:
        payload = unframe(framed)
    except DataError:
        return _FRAME
    head = record_head(float(row["label"]), int(row["id"]), int(row["size"]))[8:]
    if payload[: len(head)] != head:
        return _HEADER
    if len(payload) != len(head) + row["size"] or zlib.crc32(payload[len(head) :]) != row["crc32"]:
        return _IMAGE
    return "" if frame(payload) == framed else _PADDING


def _fill(stream: BinaryIO, view: memoryview) -> tuple[int, str]:
    """Fill view as far as possible; return the bytes read and the error that ended it, or ""."""
    got = 0
    while got < len(view):
        try:
            count = stream.readinto(view[got:])  # type: ignore[attr-defined]
        except OSError as error:
            return got, error.strerror or str(error)
        if not count:
            break
        got += count
    return got, ""


def whole_length(rows: "NDArray[np.void]") -> "NDArray[np.int64]":
    """Return the length of each record if its image does not contain the magic word, bytes."""
    size: NDArray[np.int64] = rows["size"]
    return HEAD_SIZE + size + -size % 4
