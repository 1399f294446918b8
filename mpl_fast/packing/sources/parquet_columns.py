"""The columns of a parquet file that are read: which one has the images, and which the labels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.first_few import first_few
from mpl_fast.packing.sources.source import Request
from mpl_fast.untrusted import json_value

_IMAGES = ("image", "img", "jpg", "png", "jpeg", "picture", "photo")  # column names, best first
_LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "category")


class Columns(NamedTuple):
    """The columns that are read, and the names of the classes by label if the schema has them."""

    image: str
    is_struct: bool  # {bytes, path}, else bytes
    has_path: bool
    label: str  # "": unlabeled images without one
    names: tuple[str, ...] | None


@contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Turn an error of pyarrow into a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: damaged or no parquet file ({reason})") from error


def find_columns(file: Path, request: Request) -> Columns:
    """Return the columns of a file; DataError where it is not certain which they are."""
    try:
        import pyarrow.parquet
        import pyarrow.types as kinds
    except ImportError as error:
        needed = "needs pyarrow: pip install 'mpl_fast[parquet]', or pip install pyarrow"
        raise ConfigError(f"{request.spec}: parquet {needed}") from error
    with parquet_errors(file):
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
    return Columns(image, is_struct, has_path, label, names)


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
        features = json_value(text)["info"]["features"]
    except (ValueError, KeyError, TypeError):
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
