"""Existing .rec files as sources: records are byte ranges, and only their headers are read.

InsightFace's files have header records beside the images, with two labels and no image. Its
src/data/face2rec2.py gives an image two labels too, the class and 0 or 1 (whether the face was
aligned), its RecBuilder one. Its readers (MXFaceDataset) take the first.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpl_fast.data.records import LENGTH_LIMIT, MAGIC, NO_LABEL, parse_payload, unframe
from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES
from mpl_fast.packing.sources.lists import (
    Line,
    class_names,
    class_numbers,
    read_list,
    text_lines,
    whole_label,
)
from mpl_fast.packing.sources.source import Image, Source

_FRAME = struct.Struct("<II")  # magic word; part << 29 | length
_HEADER = struct.Struct("<IfQ8x")  # of an image: number of labels, label, id, second id
_ARRAY = struct.Struct("<2f")  # the first of several labels, which follow the header
_SEVERAL = "{} labels, but only one can be packed"
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")


class FramedRecord(NamedTuple):
    """Header values of a record, and the byte range of all its parts with padding."""

    labels: int  # their number
    label: float  # the first
    second: float  # meaningless if there is one
    id: int
    start: int
    size: int
    image: int  # bytes of the image; negative if the record ends within its labels


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
    head = os.pread(descriptor, _FRAME.size + _HEADER.size + _ARRAY.size, start)
    end, frame, expected, payload = start, head, (_WHOLE, _FIRST), 0
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
        payload += size
        if end > stop:
            raise DataError(f"{path}: cut short: the record at byte {start} ends after the file")
        if part in (_WHOLE, _LAST):
            count, label, record_id = _HEADER.unpack_from(head, _FRAME.size)
            head = head.ljust(_FRAME.size + _HEADER.size + _ARRAY.size, b"\0")
            first, second = _ARRAY.unpack_from(head, _FRAME.size + _HEADER.size)
            image = payload - _HEADER.size - 4 * count
            place = (record_id, start, end - start, image)
            return FramedRecord(max(count, 1), first if count else label, second, *place)
        frame, expected = os.pread(descriptor, _FRAME.size, end), (_MIDDLE, _LAST)
        payload += 4  # the magic word that was left out between the parts


class RecordSource(Source):
    """Images of a .rec file: labels from its records, names from a .lst beside it."""

    kind = "records"
    suffixes = (".rec",)
    has_labels = True

    @staticmethod
    def decode(stored: bytes) -> bytes:
        return parse_payload(unframe(stored)).image

    def _list(self) -> Iterator[Image]:
        labels, list_path = not self.request.unlabeled, self._list_beside()
        names = classes_beside(self.file) if labels else None
        if list_path and labels and not names:
            names = class_names(list_path)
        lines = read_list(list_path, labels=labels) if list_path else iter(())
        if not list_path:
            listed = self.file.with_suffix(".lst")
            reason = "these are the ids of records, and equal: number the records, or name them in"
            self.same_names = f"{reason} {listed} (`id TAB label TAB name`)"
        highest, images, headers, several = NO_LABEL, 0, 0, None
        for frame in read_frames(self.file):
            if frame.labels > 1 and not frame.image:
                headers += 1
                continue
            try:
                label = _label_of(frame) if labels else NO_LABEL
                highest = max(highest, label)
                path = f"{frame.id}.jpg"
                if list_path:
                    path = _path_in(list_path, lines, frame.id, label)
                if names and label >= len(names):
                    raise ValueError(f"label {label}, but only {len(names)} classes are named")
            except ValueError as error:
                raise self._fault(frame, str(error)) from error
            if labels and frame.labels > 1:
                several = several or frame
            images += 1
            class_name = "" if label == NO_LABEL else names[label] if names else str(label)
            yield Image(class_name, path.rpartition("/")[2], path, frame.start, frame.size, 0)
        self._report_insightface(headers, several)
        if labels:
            self.class_order = names or class_numbers(highest, images, self.spec)

    def _fault(self, frame: FramedRecord, reason: str) -> DataError:
        return DataError(f"{self.file}: record {frame.id} at byte {frame.start}: {reason}")

    def _report_insightface(self, headers: int, several: FramedRecord | None) -> None:
        """Warn of header records; DataError for an image of two labels if there are none."""
        if headers:
            what = counted(headers, "record has", "records have")
            self._warn(f"{what} several labels and no image, as InsightFace's headers: left out")
        elif several:
            raise self._fault(several, _SEVERAL.format(several.labels))
        if several:
            line = "images have two labels, as InsightFace's; the first is taken for the class"
            self.request.report(f"{self.spec}: {line}")

    def _list_beside(self) -> Path | None:
        """Return FILE.lst beside FILE.rec, or the .lst of all shards; None if there is none."""
        stems = (self.file.stem, _SHARD.sub("", self.file.stem))
        lists = (self.file.with_name(f"{stem}.lst") for stem in stems)
        path = next((file for file in lists if file.is_file()), None)
        if path and _is_insightface_list(path):
            line = f"{path} is a list of InsightFace, not of MXNet: not read"
            self.request.report(f"{self.spec}: {line}")
            return None
        return path


def _label_of(frame: FramedRecord) -> int:
    """Return the class of an image; ValueError if that is not its one label, or none."""
    if frame.image < 0:
        raise ValueError(f"too short for the {frame.labels} labels that its header counts")
    if frame.labels > 2 or (frame.labels == 2 and frame.second not in (0, 1)):
        raise ValueError(_SEVERAL.format(frame.labels))
    return whole_label(frame.label)


def _is_insightface_list(path: Path) -> bool:
    """Return whether the lines of a .lst are `aligned TAB path TAB class ...`."""
    _, line = next(text_lines(path), (0, ""))
    columns = line.split("\t")
    return len(columns) > 2 and columns[1].lower().endswith(IMAGE_SUFFIXES)


def _path_in(list_path: Path, lines: Iterator[Line], record_id: int, label: int) -> str:
    """Return the path of a record in a list, whose lines are read along with the records."""
    line = next((line for line in lines if line.id == record_id), None)
    if line is None:
        fault = "has no line for this record, or not in the order of the records"
        raise ValueError(f"{list_path} {fault}: put it right or move it away")
    if line.label != label:
        raise ValueError(f"label {label}, but {line.label} in {list_path}, line {line.number}")
    return line.path


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
