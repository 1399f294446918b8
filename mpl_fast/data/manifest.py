"""The manifest of a folder of records: packing writes it last, loading checks it first."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpl_fast.atomic import sha256_of
from mpl_fast.errors import DataError
from mpl_fast.untrusted import file_in, json_value

FORMAT = "mpl_fast.rec/2"
MANIFEST = "manifest.json"
CLASSES = "classes.txt"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Split:
    """The files of one split. The index has offsets into the concatenated shards, in this order."""

    records: int
    shards: tuple[Path, ...]
    index: Path  # may list only some of the shards' records, and some of them more than once
    listing: Path
    record_bytes: int  # mean size of a record in these shards


@dataclass(frozen=True)
class Manifest:
    """A complete folder of records: class names (position = label) and splits by name.

    titles are names for readers, beside those of folders such as n01440764: "" for none, and empty
    if no class has one.

    The splits are "labeled", "unlabeled" and, if it was packed, "val"; "train" is the union of the
    first two if they share their records.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    content: str  # sha256 that identifies the records, independent of the folder's path
    titles: tuple[str, ...] = ()

    def class_text(self, label: int) -> str:
        """Return the name of a class, and in parentheses its title if it has one."""
        name = self.class_name(label)
        title = self.titles[label] if self.titles else ""
        return f"{name} ({title})" if title else name

    def class_name(self, label: int) -> str:
        """Return the name of a class; DataError for a label that is none's."""
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"{self.root}: label {label} is not that of a class, 0 to {len(self.classes) - 1}: "
                f"its files are damaged or were replaced; `make_rec.py verify {self.root}` finds "
                "which"
            )
        return self.classes[label]


def read_manifest(root: str | Path) -> Manifest:
    """Return the manifest of root after the cheap checks, which find stale files.

    Checked: size of every .rec file, sha256 of every split's .idx file and of the class names, and
    that the .lst files exist. Raises DataError, one line that names the file and what to do.
    """
    root = Path(root)
    stored = load_manifest(root)
    try:
        classes, titles = _read_classes(root, stored["classes"])
        shards = {shard["file"]: shard for shard in stored["shards"]}
        for name, shard in shards.items():
            _require_size(file_in(root, name), shard["bytes"])
        splits = {
            name: _read_split(root, split, shards) for name, split in stored["splits"].items()
        }
        # Includes the sha256 of every file.
        content = json.dumps([stored["splits"], stored["shards"]], sort_keys=True)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(
            f"{root / MANIFEST}: damaged ({type(error).__name__}: {error}); pack again"
        ) from error
    return Manifest(root, classes, splits, hashlib.sha256(content.encode()).hexdigest(), titles)


def text_hashes(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of every file of a pack but manifest and records, by its name."""
    hashes = {CLASSES: stored["classes"]["sha256"], stored["table"]: stored["table_sha256"]}
    for entry in (*stored["splits"].values(), *stored["shards"]):
        for kind in ("idx", "lst"):
            if kind in entry:
                hashes[entry[kind]] = entry[f"{kind}_sha256"]
    return hashes


def check_texts(root: Path, stored: Mapping[str, Any]) -> None:
    """Compare every file but the records with its sha256; DataError for the first that differs."""
    for name, sha256 in text_hashes(stored).items():
        _require_sha256(root / name, sha256)


def file_names(stored: Mapping[str, Any]) -> list[str]:
    """Return every file of a pack but the manifest."""
    return [shard["file"] for shard in stored["shards"]] + list(text_hashes(stored))


def load_manifest(root: Path) -> dict[str, Any]:
    """Return the JSON of root's manifest; DataError when there is none of this format."""
    path = root / MANIFEST
    try:
        _require_pack(root, path)
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    try:
        stored = json_value(path.read_text(encoding="utf-8"))
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


def _read_classes(root: Path, stored: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names and the titles of the classes."""
    _require_sha256(root / CLASSES, stored["sha256"])
    content = _read_file(root / CLASSES, Path.read_bytes)
    classes = tuple(content.decode("utf-8", "surrogateescape").split("\n")[:-1])
    if len(classes) != stored["n"]:
        raise DataError(f"{root / CLASSES}: {len(classes)} classes, the manifest has {stored['n']}")
    titles = tuple(stored.get("titles", ()))
    if titles and len(titles) != len(classes):
        raise TypeError(f"{len(titles)} titles for {len(classes)} classes")
    return classes, titles


def _require_size(path: Path, expected: int) -> None:
    size = _read_file(path, lambda path: path.stat().st_size)
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, the manifest has {expected}; copy it again, or delete it and "
            "run the same pack command"
        )


def _read_split(
    root: Path, stored: Mapping[str, Any], shards: Mapping[str, Mapping[str, Any]]
) -> Split:
    own = [shards[name] for name in stored["shards"]]
    index = file_in(root, stored["idx"])
    _require_sha256(index, stored["idx_sha256"])
    listing = file_in(root, stored["lst"])
    _read_file(listing, Path.stat)
    return Split(
        records=stored["records"],
        shards=tuple(root / shard["file"] for shard in own),
        index=index,
        listing=listing,
        record_bytes=sum(shard["bytes"] for shard in own) // sum(s["records"] for s in own),
    )


def _require_sha256(path: Path, sha256: str) -> None:
    if _read_file(path, sha256_of) != sha256:
        raise DataError(f"{path}: does not match the manifest (stale or damaged); pack again")


def _read_file(path: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy or pack it again") from error
