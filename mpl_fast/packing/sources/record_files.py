"""Lists the records of existing .rec files as byte ranges, reading their headers only."""

import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mpl_fast.data.records import LENGTH_LIMIT, MAGIC
from mpl_fast.errors import DataError
from mpl_fast.packing.sources.lists import class_names, read_list, whole_label

# Frame: magic word and length; image header: number of labels, label, id, second id.
_HEAD = struct.Struct("<IIIfQQ")
_FRAME = struct.Struct("<II")
_IMAGE_HEADER = _HEAD.size - _FRAME.size  # bytes
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")


class FramedRecord(NamedTuple):
    """Header values of a record, and the byte range of all its parts with padding."""

    label: float
    id: int
    labels: int  # 0: the one in `label`; else the number of labels before the image
    start: int
    size: int


class Record(NamedTuple):
    """One record with its class."""

    class_name: str
    path: str  # from the list, else `id.jpg`
    start: int
    size: int


def read_frames(path: Path) -> Iterator[FramedRecord]:
    """Yield the records of a .rec file in order; DataError at damage, with its byte offset."""
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            # Only headers are read: reading ahead would fetch the images too.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            stop = os.fstat(descriptor).st_size
            start = 0
            while start < stop:
                record = _read_frame(descriptor, start, stop, path)
                yield record
                start += record.size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _read_frame(descriptor: int, start: int, stop: int, path: Path) -> FramedRecord:
    head = os.pread(descriptor, _HEAD.size, start)
    if len(head) < _HEAD.size:
        raise DataError(f"{path}: cut short at byte {start}, in a record's header")
    magic, length, labels, label, record_id, _ = _HEAD.unpack(head)
    part, end = _part(magic, length, start, stop, path)
    if part not in (_WHOLE, _FIRST) or length % LENGTH_LIMIT < _IMAGE_HEADER:
        raise DataError(f"{path}: damaged at byte {start}: no image record begins here")
    while part not in (_WHOLE, _LAST):
        frame = os.pread(descriptor, _FRAME.size, end)
        if len(frame) < _FRAME.size:
            raise DataError(f"{path}: cut short at byte {end}, in record {record_id}")
        magic, length = _FRAME.unpack(frame)
        part, end = _part(magic, length, end, stop, path)
        if part not in (_MIDDLE, _LAST):
            raise DataError(f"{path}: damaged in record {record_id}, which begins at byte {start}")
    return FramedRecord(label, record_id, labels, start, end - start)


def _part(magic: int, length: int, start: int, stop: int, path: Path) -> tuple[int, int]:
    """Return the kind of the record part at start, and the offset after its padding."""
    if magic != MAGIC:
        raise DataError(f"{path}: damaged at byte {start}: no record begins here")
    size = length % LENGTH_LIMIT
    end = start + _FRAME.size + size + -size % 4
    if end > stop:
        raise DataError(f"{path}: cut short: the record at byte {start} ends after the file")
    return length >> 29, end


class RecordSource:
    """Images of a .rec file: labels from its records, names from a .lst beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._list = _list_beside(path)
        self._names = _classes_beside(path)
        if self._list is not None and self._names is None:
            self._names = class_names(self._list)
        self._highest = -1

    @property
    def class_order(self) -> tuple[str, ...]:
        """Return the class names by label; complete once all records were yielded."""
        if self._names is None:
            return tuple(str(label) for label in range(self._highest + 1))
        return self._names

    def records(self) -> Iterator[Record]:
        """Yield the records in file order; DataError at one that cannot be packed."""
        path_of = self._unlisted if self._list is None else self._listed(self._list)
        for frame in read_frames(self._path):
            try:
                if frame.labels:
                    raise ValueError(f"{frame.labels} labels, but only one can be packed")
                label = whole_label(frame.label)
                path = path_of(frame.id, label)
                yield Record(self._class(label), path, frame.start, frame.size)
            except ValueError as error:
                where = f"record {frame.id} at byte {frame.start}"
                raise DataError(f"{self._path}: {where}: {error}") from error

    def _class(self, label: int) -> str:
        self._highest = max(self._highest, label)
        if self._names is None:
            return str(label)
        if label >= len(self._names):
            raise ValueError(f"label {label}, but only {len(self._names)} classes are named")
        return self._names[label]

    @staticmethod
    def _unlisted(record_id: int, label: int) -> str:
        return f"{record_id}.jpg"

    def _listed(self, path: Path) -> Callable[[int, int], str]:
        """Return a function from id and label to path, reading the list along with the records."""
        lines = read_list(path)

        def path_of(record_id: int, label: int) -> str:
            line = next((line for line in lines if line.id == record_id), None)
            if line is None:
                fault = "has no line for this record, or not in the order of the records"
                raise ValueError(f"{path} {fault}: put it right or move it away")
            if line.label != label:
                raise ValueError(f"label {label}, but {line.label} in {path}, line {line.number}")
            return line.path

        return path_of


def _list_beside(path: Path) -> Path | None:
    """Return FILE.lst beside FILE.rec, or the .lst of all shards; None if there is none."""
    stems = (path.stem, _SHARD.sub("", path.stem))
    lists = (path.with_name(f"{stem}.lst") for stem in stems)
    return next((file for file in lists if file.is_file()), None)


def _classes_beside(path: Path) -> tuple[str, ...] | None:
    """Return the lines of the classes.txt beside a .rec file; None if there is none."""
    file = path.with_name("classes.txt")
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    names = tuple(text.removesuffix("\n").split("\n"))
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{file}: has an empty line, or a class twice: no name for each label")
    return names
