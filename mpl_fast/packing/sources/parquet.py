"""Parquet files as sources, as Hugging Face publishes image datasets."""

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.data.records import LABEL_LIMIT, NO_LABEL
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import Tally, counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, kind_of
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource

_IMAGES = ("image", "img", "jpg", "png", "jpeg", "picture", "photo")  # column names, best first
_LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "category")
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$|[-_.]?\d+$")
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "WebP": ".webp"}
_PEEKED = 1000  # names in a folder that tell what it is
_ROWS = 64  # whose images are in memory together
_SMALL_ROWS = 1 << 14  # the same of labels and paths
_BUFFER = 1 << 20  # bytes that are read at once; without it, a whole column of a row group


class _Columns(NamedTuple):
    """The columns that are read, and the names of the classes by label if the schema has them."""

    image: str
    is_struct: bool  # {bytes, path}, else bytes
    has_path: bool
    label: str  # "": unlabeled images without one
    names: tuple[str, ...] | None


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
        columns = _columns(files[0], request)
        for file in files[1:]:
            if _columns(file, request) != columns:
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


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Turn an error of pyarrow into a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: damaged or no parquet file ({reason})") from error


def _columns(file: Path, request: Request) -> _Columns:
    try:
        import pyarrow.parquet
        import pyarrow.types as kinds
    except ImportError as error:
        needed = "needs pyarrow: pip install 'mpl_fast[parquet]', or pip install pyarrow"
        raise ConfigError(f"{request.spec}: parquet {needed}") from error
    with _errors(file):
        schema = pyarrow.parquet.read_schema(file)
    features = _features(schema)
    types = {field.name: field.type for field in schema}
    images = [
        name
        for name, kind in types.items()
        if _is_bytes(kind)
        or (kinds.is_struct(kind) and any(c.name == "bytes" and _is_bytes(c.type) for c in kind))
    ]
    image = _best(images, _IMAGES)
    if image is None:
        which = f"several columns may be images: {', '.join(images)}" if images else "no images"
        raise DataError(f"{file}: {which}; of its columns {_shown(types)} one must be named image")
    try:
        label, names = _label(file, types, features, request.folder)
    except DataError:
        if not request.unlabeled:
            raise
        label, names = "", None
    is_struct = kinds.is_struct(types[image])
    children = types[image] if is_struct else ()
    has_path = any(child.name == "path" and _is_text(child.type) for child in children)
    return _Columns(image, is_struct, has_path, label, names)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _label(
    file: Path, types: dict[str, Any], features: dict[str, Any], wanted: str
) -> tuple[str, tuple[str, ...] | None]:
    """Return the column of the labels, and the names of the classes by label."""
    import pyarrow.types as kinds

    label = _label_column(file, types, features, wanted)
    kind = types[label]
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        raise DataError(f"{file}: {label} has several labels an image, but only one can be packed")
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    is_text = _is_text(kind)
    if not (is_text or kinds.is_integer(kind) or kinds.is_boolean(kind)):
        raise DataError(f"{file}: column {label} is {kind}; labels are whole numbers or text")
    return label, None if is_text else _class_names(file, label, features)


def _features(schema: Any) -> dict[str, Any]:
    """Return Hugging Face's description of the columns, {} if there is none."""
    try:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _label_column(file: Path, types: dict[str, Any], features: dict[str, Any], wanted: str) -> str:
    if wanted:
        if wanted not in types:
            raise DataError(f"{file}: no column {wanted!r}; it has {_shown(types)}")
        return wanted
    classes = [name for name in types if _is_class(features.get(name))]
    label = _best(classes, _LABELS) or _best([name for name in _LABELS if name in types], _LABELS)
    if label is None:
        what = f"several columns may be the label: {', '.join(classes)}" if classes else "no label"
        hint = f"name one as {file}:COLUMN"
        raise DataError(f"{file}: {what} among its columns {_shown(types)}; {hint}")
    return label


def _best(found: Sequence[str], order: Sequence[str]) -> str | None:
    """Return the only one found, or the first in order; None if neither is there."""
    if len(found) == 1:
        return found[0]
    return next((name for name in order if name in found), None)


def _shown(types: dict[str, Any]) -> str:
    return first_few([f"{name} ({str(kind).partition('<')[0]})" for name, kind in types.items()])


def _is_class(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _class_names(file: Path, label: str, features: dict[str, Any]) -> tuple[str, ...] | None:
    if not _is_class(features.get(label)) or not (names := features[label].get("names")):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: the classes of column {label} are no list of texts in the schema")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can name
        raise DataError(f"{file}: a class of column {label} is no text ({error.reason})") from error
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{file}: a class of column {label} has no name, or that of another")
    return tuple(names)


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
    """What labels and paths of all rows say."""

    own_names: bool  # each image has a path whose last part is unique in its class
    texts: tuple[str, ...]  # the classes, if labels are text


def _check_rows(files: Sequence[Path], columns: _Columns) -> _Rows:
    """DataError for missing or unknown labels; images are not read.

    Takes 8 bytes of memory an image, and the classes.
    """
    import numpy as np

    read = [columns.label] if columns.label else []
    read += [f"{columns.image}.path"] if columns.has_path else []
    own_names, hashes, faults = columns.has_path, array("q"), Tally(3)
    texts: set[str] = set()
    for file, first, batch in _batches(files, read, _SMALL_ROWS) if read else ():
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


def _labels_of(file: Path, batch: Any, columns: _Columns) -> list[Any]:
    """Return the labels of some rows, None for each if they have none."""
    if not columns.label:
        return [None] * int(batch.num_rows)
    return _values(file, batch.column(columns.label))


def _values(file: Path, column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: a label or path is no text in UTF-8 ({error})") from error
    return values


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _images(
    files: Sequence[Path], columns: _Columns, rows: _Rows, classes: dict[str, str]
) -> Iterator[tuple[int | str | None, str, bytes]]:
    """Yield label, name and content of the images, without holding them in memory."""
    read = [f"{columns.image}.bytes" if columns.is_struct else columns.image]
    read += [columns.label] if columns.label else []
    read += [f"{columns.image}.path"] if rows.own_names else []
    for file, first, batch in _batches(files, read, _ROWS):
        images = batch.column(columns.image)
        contents = images.field("bytes") if columns.is_struct else images
        paths = images.field("path") if rows.own_names else None
        for at, label in enumerate(_labels_of(file, batch, columns)):
            content = contents[at].as_py()
            if content is None:
                fault = "has no image bytes; files that it names by path are not read"
                raise DataError(f"{file}: row {first + at} {fault}")
            suffix = _SUFFIXES.get(kind_of(content), "")
            name = f"{file.stem}-{first + at:06d}{suffix}"
            if paths is not None:
                name = _base(paths[at].as_py())
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
            _errors(file),
            pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as parquet,
        ):
            for batch in parquet.iter_batches(rows, columns=columns):
                yield file, first, batch
                first += batch.num_rows
