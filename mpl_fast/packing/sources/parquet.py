"""Parquet files as sources, as Hugging Face publishes image datasets."""

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.data.records import LABEL_LIMIT, NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, kind_of
from mpl_fast.packing.sources.parquet_columns import Columns, find_columns, parquet_errors
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource

_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$|[-_.]?\d+$")
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "WebP": ".webp"}
_PEEKED = 1000  # names in a folder that determine what it is
# Of a value that is stored once for many rows Arrow makes a copy for each row of a batch; not of a
# label, which can be read as an index of values. A row by itself takes 20 microseconds more.
_LABEL_ROWS = 1 << 14
_BUFFER = 1 << 20  # bytes that are read at once; without it, a whole column of a row group


class ParquetSource(UnpackedSource):
    """Rows of image and label; the bytes of images pass through. `FILE:COLUMN` has the labels."""

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether a path is a parquet file, or a folder of them, without images."""
        if not path.is_dir():
            return path.suffix == ".parquet"
        found = False
        with os.scandir(path) as entries:
            for entry in islice(entries, _PEEKED):
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(IMAGE_SUFFIXES) or entry.is_dir():
                    return False
                found = found or entry.name.endswith(".parquet")
        return found

    @classmethod
    def _unpack(cls, request: Request) -> Unpacked:
        files = request.files or (request.path,)
        if request.path.is_dir():
            files = _one_split(request.path)
        columns = find_columns(files[0], request)
        for file in files[1:]:
            if find_columns(file, request) != columns:
                raise DataError(f"{file}: its columns or classes are not those of {files[0]}")
        what = f", classes column {columns.label}" if columns.label else ", no classes"
        named = "" if columns.names is None else f" ({len(columns.names)} names in the schema)"
        request.report(f"{request.spec}: images are column {columns.image}{what}{named}")
        try:
            rows = _check_rows(files, columns)
        except DataError:
            if not (request.unlabeled and columns.label):
                raise
            columns = columns._replace(label="", names=None)
            rows = _check_rows(files, columns)
        names = columns.names or rows.texts
        classes = _without_slash(names, f"{files[0]}: column {columns.label}", request)
        images = _images(files, columns, rows, classes)
        variant = "" if columns.label else "unlabeled"
        return Unpacked(files, columns.names and [*classes.values()], images, variant)


def _one_split(folder: Path) -> tuple[Path, ...]:
    """Return the parquet files of a folder, which must be those of one split by their names."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("[!.]*.parquet")):
        splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if len(splits) > 1:
        held = first_few([f"{name} ({counted(len(of), 'file')})" for name, of in splits.items()])
        example = folder / f"{max(splits, key=lambda name: len(splits[name]))}*.parquet"
        raise DataError(f"{folder}: holds several splits: {held}; name one, as '{example}'")
    return tuple(*splits.values())


def _without_slash(names: Iterable[str], where: str, request: Request) -> dict[str, str]:
    """Return names without slashes, which would be taken for the end of the class in a .lst."""
    safe = {name: name.replace("/", "_") for name in names}
    changed = [name for name in safe if "/" in name]
    if len(set(safe.values())) < len(safe):
        raise DataError(f"{where}: classes that differ only in / and _: {first_few(changed)}")
    if changed:
        what = counted(len(changed), "class is", "classes are")
        request.report(f"{where}: {what} written with _ in place of /: {first_few(changed, 3)}")
    return safe


class _Rows(NamedTuple):
    """What the labels and paths of all rows give."""

    own_names: bool  # each image has a path whose last part is unique in its class
    texts: tuple[str, ...]  # the classes, if labels are text


def _check_rows(files: Sequence[Path], columns: Columns) -> _Rows:
    """DataError for missing or unknown labels; images are not read.

    Takes 8 bytes of memory an image, and the classes.
    """
    import numpy as np

    read = [columns.label] if columns.label else []
    read += [f"{columns.image}.path"] if columns.has_path else []
    own_names, hashes, faults = columns.has_path, array("q"), Tally(3)
    texts: set[str] = set()
    rows = 1 if columns.has_path else _LABEL_ROWS
    for file, first, batch in _batches(files, read, rows) if read else ():
        labels = _labels_of(file, batch, columns)
        for row, label in enumerate(labels if columns.label else (), first):
            if fault := _label_fault(label, columns.names):
                faults.add(f"{file.name} row {row} ({fault})")
        texts.update(label for label in labels if isinstance(label, str))
        if own_names:
            paths = _values(file, batch.column(columns.image).field("path"))
            own_names = all(path and _base(path) for path in paths)
        if own_names:
            hashes.extend(hash(pair) for pair in zip(labels, map(_base, paths), strict=True))
    if faults.count:
        what = counted(faults.count, "row has", "rows have")
        raise DataError(f"{files[0].parent}: {what} no usable {columns.label}: {faults}")
    unique = len(np.unique(np.frombuffer(hashes, np.int64))) == len(hashes)
    return _Rows(own_names and unique, tuple(sorted(texts)))


def _label_fault(label: object, names: Sequence[str] | None) -> str:
    """Return why this is no label, or ""."""
    if label is None or label == "":
        return "none"
    if isinstance(label, int):
        if not NO_LABEL <= label < LABEL_LIMIT:
            return str(label)
        if names is not None and label >= len(names):
            return f"{label}, but {len(names)} classes are named"
    return ""


def _labels_of(file: Path, batch: Any, columns: Columns) -> list[Any]:
    """Return the labels of some rows, None for each if they have none."""
    if not columns.label:
        return [None] * int(batch.num_rows)
    return _values(file, batch.column(columns.label))


def _values(file: Path, column: Any) -> list[Any]:
    import pyarrow.types as kinds

    try:
        if not kinds.is_dictionary(column.type):
            values: list[Any] = column.to_pylist()
        else:
            found = column.dictionary.to_pylist()
            values = [None if at is None else found[at] for at in column.indices.to_pylist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: a label or path is no text in UTF-8 ({error})") from error
    return values


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _images(
    files: Sequence[Path], columns: Columns, rows: _Rows, classes: dict[str, str]
) -> Iterator[tuple[int | str | None, str, memoryview]]:
    """Yield label, name and content of the images, without holding them in memory."""
    read = [f"{columns.image}.bytes" if columns.is_struct else columns.image]
    read += [columns.label] if columns.label else []
    read += [f"{columns.image}.path"] if rows.own_names else []
    for file, first, batch in _batches(files, read, 1):
        images = batch.column(columns.image)
        contents = images.field("bytes") if columns.is_struct else images
        paths = images.field("path") if rows.own_names else None
        for at, label in enumerate(_labels_of(file, batch, columns)):
            buffer = contents[at].as_buffer()  # not a copy
            if buffer is None:
                fault = "has no image bytes; files that it names by path are not read"
                raise DataError(f"{file}: row {first + at} {fault}")
            content = memoryview(buffer)
            if paths is not None:
                name = _base(paths[at].as_py())
            else:
                suffix = _SUFFIXES.get(kind_of(content), "")
                name = f"{file.stem}-{first + at:06d}{suffix}"
            if isinstance(label, str):
                label = classes[label]
            elif label is not None:
                label = None if label == NO_LABEL else int(label)
            yield label, name, content


def _batches(
    files: Sequence[Path], columns: Sequence[str], rows: int
) -> Iterator[tuple[Path, int, Any]]:
    """Yield file, number of the first row, and the columns of a few rows, in order."""
    import pyarrow.parquet

    for file in files:
        first = 0
        with (
            parquet_errors(file),
            pyarrow.parquet.ParquetFile(
                file,
                buffer_size=_BUFFER,
                pre_buffer=False,
                read_dictionary=columns if rows > 1 else None,
            ) as parquet,
        ):
            for batch in parquet.iter_batches(rows, columns=columns):
                yield file, first, batch
                first += batch.num_rows
