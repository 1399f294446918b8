"""The bytes of a .rec file against the rows of the table: what differs, and in which record.

Frame, header and padding of a record follow from its row, and the crc32 there tells of its image.
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mpl_fast.data.records import HEAD_SIZE, MAGIC, frame, record_head, unframe
from mpl_fast.errors import DataError
from mpl_fast.packing.write.pool import Advance
from mpl_fast.packing.write.shard import StoppedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 4 << 20  # bytes read at once; a longer record is read whole
_FRAME, _HEADER, _PADDING, _IMAGE = "frame", "header", "padding", "image"


class Fault(NamedTuple):
    row: int  # in the rows of the shard
    text: str


class Pass(NamedTuple):
    """What reading a file once has told."""

    sha256: str
    size: int  # bytes that could be read
    faults: list[Fault]
    error: str  # why the file could not be read to its end, else ""


class RecordReader:
    """Reads a file in blocks of whole records and compares each record with its row."""

    def __init__(self, rows: "NDArray[np.void]", size: int, advance: Advance) -> None:
        self._rows, self._advance = rows, advance
        self._told = 0  # records of which advance was told
        longest = int(rows["length"].max())
        self._view = memoryview(bytearray(min(size, max(_BLOCK, longest))))

    def read(self, stream: BinaryIO, *, images: bool, decode: bool) -> Pass:
        """Read the bytes that the file should have; stop at its end or at a disk error."""
        digest = hashlib.sha256()
        faults: list[Fault] = []
        done = 0
        for first, last in self._blocks():
            wanted = int(self._rows["offset"][last - 1] + self._rows["length"][last - 1]) - done
            got, error = _fill(stream, self._view[:wanted])
            digest.update(self._view[:got])
            faults += self._faults(first, last, got, images, decode)
            done += got
            if not self._advance(*((last - first, got) if last > self._told else (0, 0))):
                raise StoppedError
            self._told = max(self._told, last)
            if got < wanted:
                faults += (Fault(row, "is missing") for row in range(last, len(self._rows)))
                return Pass(digest.hexdigest(), done, faults, error)
        return Pass(digest.hexdigest(), done, faults, "")

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of the rows that fit into the buffer together."""
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
        """Yield what is wrong with the records of a block of which `got` bytes could be read."""
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
            yield Fault(at, f"undamaged, but cannot be decoded: {reason}")


def _around_the_image(
    view: memoryview, rows: "NDArray[np.void]", starts: "NDArray[np.int64]"
) -> "NDArray[np.uint8]":
    """Return for each record of one part 0 (sound), 1 (frame), 2 (header) or 3 (padding)."""
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
    """Return what is damaged in a record of several parts, or ""."""
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
    """Read as much of a view as the file has; return the bytes and why there are no more."""
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
    """Return the bytes that each record has when its image does not hold the magic word."""
    size: NDArray[np.int64] = rows["size"]
    return HEAD_SIZE + size + -size % 4
