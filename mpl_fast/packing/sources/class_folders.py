"""Sources in which the folder of an image file names its class, or a labels file does."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, kind_of
from mpl_fast.packing.sources.class_level import (
    class_of,
    class_warnings,
    level,
    require_certain,
)
from mpl_fast.packing.sources.labels import LabelLine, Labels
from mpl_fast.packing.sources.source import FOLDER, Image, Source

ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: the classes of the images below its folder
_PACKED = {  # suffixes of files that hold images
    ".parquet": "parquet files",
    ".rec": "records",
    ".zip": "zip archives",
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), "tars"),
}
_START = re.compile(r"[^\d]+(?=\d)")  # of the names of shards


class Entry(NamedTuple):
    """A file or folder below a source."""

    path: str  # inside the source, with "/" between its parts
    start: int  # as in Image
    size: int  # bytes; -1 for a folder
    stamp: int = 0


class ClassFolders(Source):
    """Files and folders, of which images are packed and hidden ones ignored."""

    @abstractmethod
    def _entries(self) -> Iterator[Entry]:
        """Yield all files and folders."""

    @abstractmethod
    def _head(self, entry: Entry) -> bytes:
        """Return the first PEEKED bytes of a file, or all."""

    def _annotations(self) -> bytes | None:
        """Return the content of the ANNOTATIONS at the top; None if there are none."""
        return None

    @property
    def by_folder(self) -> bool:
        """Whether folders give the classes."""
        given = self.request.labels or self.request.unlabeled
        return not given and self._annotations() is None

    def _list(self) -> Iterator[Image]:
        self._others = Tally(3)
        # Those that hold images, by suffix: how many, and the first, where train is before others.
        self._packed: dict[str, tuple[int, tuple[bool, str]]] = {}
        self._folders: set[str] = set()
        self._counts: Counter[str] = Counter()  # images by folder
        self._outside = Tally(3)  # images without a class
        labels = self.request.labels
        annotated = None if labels or self.request.unlabeled else self._annotations()
        if annotated is not None:
            labels = _annotated(annotated, f"{self.spec}/{ANNOTATIONS}")
            self.request.report(f"{self.spec}: classes are those in {ANNOTATIONS}")
        self._flat = bool(labels or self.request.unlabeled)  # folders give no classes
        images = self._images()
        yield from labels.labeled(images, self.request) if labels else images
        if labels and annotated is not None:
            labels.require_fit()
        self._warn_of_leftovers()
        if self._counts and not self._flat:
            self._conclude()

    def _images(self) -> Iterator[Image]:
        previous = class_name = ""
        for entry in self._entries():
            path, start, size, stamp = entry
            if path.startswith(".") or "/." in path:
                continue
            if size < 0:
                self._folders.add(path)
                continue
            # Few files are opened: a folder of a million images is listed by their suffixes.
            if not path.lower().endswith(IMAGE_SUFFIXES) and not kind_of(self._head(entry)):
                self._add_other(path)
                continue
            folder, _, name = path.rpartition("/")
            if folder != previous:
                previous, class_name = folder, class_of(folder, self.request.class_from)
            self._counts[folder] += 1
            if not self._flat and not class_name:
                self._outside.add(path)
                continue
            # As Image(...), in a third of the time.
            yield Image._make((class_name, name, path, start, size, stamp))

    def _add_other(self, path: str) -> None:
        """Count a file that is no image."""
        folder, _, name = path.rpartition("/")
        if name != ANNOTATIONS or self.request.labels or self.request.unlabeled:
            self._others.add(path)
            for suffix in filter(name.endswith, _PACKED):
                this = (not name.startswith("train"), path)
                count, first = self._packed.get(suffix, (0, this))
                self._packed[suffix] = count + 1, min(first, this)
        elif folder:
            fault = f"{path} gives the classes of images beside it"
            raise DataError(f"{self.spec}: {fault}; name {folder} as a source of its own")
        elif not self._flat:
            fault = f"{path} gives classes, but is not read from a tar"
            raise DataError(
                f"{self.spec}: {fault}; unpack the tar, or give them with a labels file"
            )

    def _warn_of_leftovers(self) -> None:
        if count := self._others.count:
            what = counted(count, "file is not an image", "files are not images")
            self._warn(f"{what}, left out: {self._others}")
        if self.kind == FOLDER:
            self._warn_of_packed()
        if self.request.unlabeled:
            return  # what follows is about classes
        filled: set[str] = set()
        for folder in (*self._counts, *(folder.rpartition("/")[0] for folder in self._folders)):
            while folder not in filled:
                filled.add(folder)
                folder = folder.rpartition("/")[0]
        if empty := sorted(self._folders - filled):
            what = counted(
                len(empty), "folder holds no image and gives", "folders hold no image and give"
            )
            self._warn(f"{what} no class: {first_few(empty)}")

    def _warn_of_packed(self) -> None:
        """Print how files that hold images are given."""
        for suffix, (count, (_, path)) in self._packed.items():
            folder, _, name = f"{self.spec.rstrip('/')}/{path}".rpartition("/")
            if count > 1 and suffix not in (".rec", ".zip"):  # a pattern may name them
                start = _START.match(name)
                name = f"{start[0] if start else ''}*{suffix}"
            self.warnings.append(f"{folder} holds {_PACKED[suffix]}: give '{folder}/{name}'")

    def _conclude(self) -> None:
        """Print what was found out about the classes; DataError unless every image has one."""
        class_from = self.request.class_from
        if count := self._outside.count:
            depth, what = level(class_from), counted(count, "image is", "images are")
            fault, hint = "outside any class folder", self._outside_hint()
            if depth > 1:
                fault, hint = f"below fewer than {depth} folders", "give another --class-from"
            raise DataError(f"{self.spec}: {what} {fault}: {self._outside}; {hint}")
        if not class_from:
            between = "/" if self.kind == FOLDER or self.request.folder else ":"
            inside = f"{self.spec.rstrip('/:')}{between}"
            if line := require_certain(self._counts, self.spec, inside):
                self.request.report(f"{self.spec}: {line}")
        for line in class_warnings(self._counts, class_from):
            self._warn(line)

    def _outside_hint(self) -> str:
        """Return what to do with images outside class folders."""
        given = "with --labels (of --val: --val-labels)"
        if self._counts.keys() != {""}:
            return f"move them into one, or away, or give all classes {given}"
        hint = f"give their classes {given}, or all as --unlabeled-src if nobody has labeled them"
        above = self.kind == FOLDER or self.request.folder
        return f"{hint}, or the folder above if this one is a class" if above else hint


def _annotated(content: bytes, where: str) -> Labels:
    """Return the classes of images: `name TAB class TAB box` a line."""
    found = []
    lines = content.decode("utf-8", "surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not name or not label or "/" in label:
            raise DataError(f"{where}: line {number}: {line!r} is not `name TAB class TAB box`")
        found.append(LabelLine(number, name, label))
    return Labels(where, found)
