"""The manifest of a folder of records: written last by packing, checked first by loading."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpl_fast.errors import DataError

FORMAT = "mpl_fast.rec/1"
MANIFEST = "manifest.json"
CLASSES = "classes.txt"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Split:
    """The files of one split. Offsets in the index count over the shards joined in this order."""

    records: int
    shards: tuple[Path, ...]
    index: Path
    listing: Path


@dataclass(frozen=True)
class Manifest:
    """A complete folder of records: class names (position = label) and splits by name.

    The names are "labeled", "unlabeled" and, when it was packed, "val".
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    content: str  # sha256 that tells these records from all others, wherever the folder lies


def read_manifest(root: str | Path) -> Manifest:
    """Return the manifest of root after the cheap checks, so that no stale file is read as data.

    Checked: every .rec file's size, every .idx file's sha256 and number of lines, the class names,
    and that the .lst files are there.
    Raises DataError, one line that names the file and what to do.
    """
    root = Path(root)
    stored = load_manifest(root)
    try:
        classes = _read_classes(root, stored["classes"])
        splits = {name: _read_split(root, split) for name, split in stored["splits"].items()}
        content = json.dumps(stored["splits"], sort_keys=True)  # with the sha256 of every file
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{root / MANIFEST}: damaged ({type(error).__name__}: {error}); pack again"
        ) from error
    return Manifest(root, classes, splits, hashlib.sha256(content.encode()).hexdigest())


def check_texts(root: Path, stored: Mapping[str, Any]) -> None:
    """Compare the files that read_manifest does not read, but for the records, with their sha256.

    These are the .lst files and the .idx files of single shards. Raises DataError for the first
    that differs.
    """
    for split in stored["splits"].values():
        _read_checked(root / split["lst"], split["lst_sha256"])
        for shard in split["shards"]:
            if "idx" in shard:
                _read_checked(root / shard["idx"], shard["idx_sha256"])


def file_names(stored: Mapping[str, Any]) -> list[str]:
    """Return every file of a pack but the manifest."""
    names = [CLASSES]
    for split in stored["splits"].values():
        names += split["idx"], split["lst"]
        for shard in split["shards"]:
            names += (shard[key] for key in ("file", "idx") if key in shard)
    return names


def load_manifest(root: Path) -> dict[str, Any]:
    """Return the JSON of root's manifest; DataError when there is none of this format."""
    path = root / MANIFEST
    try:
        _require_pack(root, path)
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); pack again") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise DataError(f"{path}: format {found!r} is not {FORMAT!r}; pack with this version")
    return stored


def _require_pack(root: Path, manifest: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of records; make one with tools/make_rec.py pack")
    if not manifest.is_file():
        state = "has no" if any(root.iterdir()) else "is empty: no"
        raise DataError(
            f"{root}: {state} {MANIFEST}, so no finished pack; make it with tools/make_rec.py pack"
        )


def _read_classes(root: Path, stored: Mapping[str, Any]) -> tuple[str, ...]:
    content = _read_checked(root / CLASSES, stored["sha256"])
    classes = tuple(content.decode("utf-8", "surrogateescape").split("\n")[:-1])
    if len(classes) != stored["n"]:
        raise DataError(f"{root / CLASSES}: {len(classes)} classes, the manifest has {stored['n']}")
    return classes


def _read_split(root: Path, stored: Mapping[str, Any]) -> Split:
    shards = []
    for shard in stored["shards"]:
        path = root / shard["file"]
        size = _read_file(path, lambda path: path.stat().st_size)
        if size != shard["bytes"]:
            raise DataError(
                f"{path}: {size} bytes, the manifest has {shard['bytes']}; copy or pack it again"
            )
        shards.append(path)
    index = root / stored["idx"]
    lines = _read_checked(index, stored["idx_sha256"]).count(b"\n")
    if not lines == stored["records"] == sum(shard["records"] for shard in stored["shards"]):
        raise DataError(
            f"{index}: {lines} lines for {stored['records']} records in the manifest; pack again"
        )
    listing = root / stored["lst"]
    _read_file(listing, Path.stat)
    return Split(stored["records"], tuple(shards), index, listing)


def _read_checked(path: Path, sha256: str) -> bytes:
    content = _read_file(path, Path.read_bytes)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: does not match the manifest (stale or damaged); pack again")
    return content


def _read_file(path: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy or pack it again") from error
