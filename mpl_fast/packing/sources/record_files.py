"""Existing .rec files as sources: records are byte ranges, and only their headers are read."""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpl_fast.data.records import LENGTH_LIMIT, MAGIC, NO_LABEL, parse_payload, unframe
from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.sources.lists import Line, class_names, read_list, whole_label
from mpl_fast.packing.sources.source import Image, Source

_FRAME = struct.Struct("<II")  # magic word; part << 29 | length
_HEADER = struct.Struct("<IfQ8x")  # of an image: number of labels, label, id, second id
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")


class FramedRecord(NamedTuple):
    """Header values of a record, and the byte range of all its parts with padding."""

    labels: int  # 0: the one in `label`; else the number of labels before the image
    label: float
    id: int
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
    head = os.pread(descriptor, _FRAME.size + _HEADER.size, start)
    end, frame, expected = start, head, (_WHOLE, _FIRST)
    while True:
        if len(frame) < _FRAME.size:
            raise DataError(f"{path}: cut short at byte {end}, in a record's header")
        magic, word = _FRAME.unpack_from(frame)
        part, size = word >> 29, word % LENGTH_LIMIT
        if magic != MAGIC or part not in expected or (end == start and size < _HEADER.size):
            where = f"in the record that begins at byte {start}"
            fault = "no image record begins here" if end == start else where
            raise DataError(f"{path}: damaged at byte {end}: {fault}")
        end += _FRAME.size + size + -size % 4
        if end > stop:
            raise DataError(f"{path}: cut short: the record at byte {start} ends after the file")
        if part in (_WHOLE, _LAST):
            labels, label, record_id = _HEADER.unpack_from(head, _FRAME.size)
            return FramedRecord(labels, label, record_id, start, end - start)
        frame, expected = os.pread(descriptor, _FRAME.size, end), (_MIDDLE, _LAST)


class RecordSource(Source):
    """Images of a .rec file: labels from its records, names from a .lst beside it."""

    kind = "records"
    suffixes = (".rec",)
    has_labels = True

    @staticmethod
    def decode(stored: bytes) -> bytes:
        return parse_payload(unframe(stored)).image

    def _list(self) -> Iterator[Image]:
        labels, list_path = not self.request.unlabeled, _list_beside(self.file)
        names = classes_beside(self.file) if labels else None
        if list_path and labels and not names:
            names = class_names(list_path)
        lines = read_list(list_path, labels=labels) if list_path else iter(())
        highest = NO_LABEL
        for frame in read_frames(self.file):
            try:
                if frame.labels and labels:
                    raise ValueError(f"{frame.labels} labels, but only one can be packed")
                label = whole_label(frame.label) if labels else NO_LABEL
                highest = max(highest, label)
                path = f"{frame.id}.jpg"
                if list_path:
                    path = _path_in(list_path, lines, frame.id, label)
                if names and label >= len(names):
                    raise ValueError(f"label {label}, but only {len(names)} classes are named")
            except ValueError as error:
                where = f"record {frame.id} at byte {frame.start}"
                raise DataError(f"{self.file}: {where}: {error}") from error
            class_name = "" if label == NO_LABEL else names[label] if names else str(label)
            yield Image(class_name, path.rpartition("/")[2], path, frame.start, frame.size, 0)
        if labels:
            self.class_order = names or tuple(map(str, range(highest + 1)))


def _path_in(list_path: Path, lines: Iterator[Line], record_id: int, label: int) -> str:
    """Return the path of a record in a list, whose lines are read along with the records."""
    line = next((line for line in lines if line.id == record_id), None)
    if line is None:
        fault = "has no line for this record, or not in the order of the records"
        raise ValueError(f"{list_path} {fault}: put it right or move it away")
    if line.label != label:
        raise ValueError(f"label {label}, but {line.label} in {list_path}, line {line.number}")
    return line.path


def _list_beside(path: Path) -> Path | None:
    """Return FILE.lst beside FILE.rec, or the .lst of all shards; None if there is none."""
    stems = (path.stem, _SHARD.sub("", path.stem))
    lists = (path.with_name(f"{stem}.lst") for stem in stems)
    return next((file for file in lists if file.is_file()), None)


def classes_beside(path: Path) -> tuple[str, ...] | None:
    """Return the lines of the classes.txt beside a file; None if there is none."""
    file = path.with_name("classes.txt")
    try:
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    names = tuple(text.removesuffix("\n").split("\n"))
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{file}: has an empty line, or a class twice: no name for each label")
    if wrong := [name for name in names if "/" in name]:
        raise DataError(f"{file}: a class name has no /: {first_few(wrong)}")
    return names
