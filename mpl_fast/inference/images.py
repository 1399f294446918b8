"""The images to predict: listed once, read one by one by any thread."""

import hashlib
import os
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from mpl_fast.data.manifest import MANIFEST, read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.errors import DataError
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, PEEKED, kind_of
from mpl_fast.packing.sources.class_level import class_of
from mpl_fast.packing.sources.folder import FolderSource
from mpl_fast.packing.sources.kinds import DECODERS, open_source
from mpl_fast.packing.sources.source import IN_SHARD, SHARDS, Source

DEFAULT_SPLIT = "unlabeled"


@dataclass(frozen=True)
class Images:
    """Images in a fixed order, by their place in it."""

    names: Sequence[str]
    """Paths inside the source; of records, their names in the .lst."""
    known: Sequence[str]
    """The class that records or the folder give; "" if none."""
    content: str
    """A digest that changes with any image: with names, sizes and times, or records."""
    read: Callable[[int], bytes]
    """The encoded image, of any thread. Raises OSError or `DataError`."""
    labeled: Set[str] = frozenset()
    """Names of images that keep the label they have."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Those of them that a labels file for these images has to list, some perhaps of another split,
    with their classes."""
    warnings: Sequence[str] = ()


def open_images(spec: str, work: Path, report: Callable[[str], None]) -> Images:
    """Lists what `spec` names: an image file, a pack (``REC``, ``REC:SPLIT``), or any source of
    `make_rec.py pack`.

    Compressed archives and parquet are unpacked into `work`, once. Raises `DataError` if it cannot
    be read or holds no image.
    """
    path, colon, split = spec.rpartition(":") if not Path(spec).exists() else (spec, "", "")
    if (Path(path) / MANIFEST).is_file():
        return _of_records(Path(path), split if colon else DEFAULT_SPLIT)
    if (file := Path(spec)).is_file() and _is_image(file):
        state = file.stat()
        content = _digest(f"{file.absolute()}\0{state.st_size}\0{state.st_mtime_ns}")
        folder = file.absolute().parent.name
        return Images([file.name], [folder], content, lambda _: file.read_bytes())
    return _of_source(open_source(spec, None, work, report, unlabeled=True))


def _of_records(root: Path, name: str) -> Images:
    manifest = read_manifest(root)
    if name not in manifest.splits:
        raise DataError(f"{root}: has no split {name!r}: give {', '.join(manifest.splits)}")
    split = SplitImages(manifest.splits[name])
    known = [manifest.class_name(label) if label >= 0 else "" for label in split.labels]
    own = SplitImages(manifest.splits["labeled"])
    labels = dict(zip(own.names, map(manifest.class_name, own.labels), strict=True))
    content = _digest(f"{manifest.content}\0{name}")
    if all(known):  # one source has the labeled images, too
        return Images(split.names, known, content, split.image, labels.keys(), labels)
    labeled = {one for one, label in zip(split.names, known, strict=True) if label}
    return Images(split.names, known, content, split.image, labeled)


def _of_source(source: Source) -> Images:
    found = [(one.path, one.start, one.size, one.stamp) for one in source.images()]
    if isinstance(source, FolderSource):
        found.sort()  # a folder lists its files in any order
    names = [path for path, *_ in found]
    starts = array("q", (start for _, start, *_ in found))
    sizes = array("q", (size for *_, size, _ in found))
    digest = hashlib.sha256(os.fsencode(f"{source.file.absolute()}\0{source.stamp}"))
    for row in found:
        digest.update(repr(row).encode())
    decode, behind = DECODERS.get(source.kind, (bytes, 0))

    def read(place: int) -> bytes:
        if starts[place] < 0:
            return (source.file / names[place]).read_bytes()
        inside = names[place].partition(IN_SHARD)[0] if source.kind == SHARDS else ""
        with (source.file / inside).open("rb") as file:
            return decode(os.pread(file.fileno(), sizes[place] + behind, starts[place]))

    known = [class_of(name.rpartition("/")[0], None) for name in names]
    return Images(names, known, digest.hexdigest(), read, warnings=tuple(source.warnings))


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with file.open("rb") as opened:
            return bool(kind_of(opened.read(PEEKED)))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
