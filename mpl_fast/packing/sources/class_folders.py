"""Sources in which the folder of an image file names its class, or a labels file does."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import Tally, counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, kind_of
from mpl_fast.packing.sources.labels_file import labeled_images, matched_images
from mpl_fast.packing.sources.source import Image, Source

ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: the classes of the images below its folder
_INNER = "images"  # a folder of this name inside a class folder is no class


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

    def _list(self) -> Iterator[Image]:
        self._others = Tally(3)
        self._folders: set[str] = set()
        self._classes: dict[str, set[str]] = defaultdict(set)  # the folders of each
        labels = self.request.labels
        annotated = None if labels or self.request.unlabeled else self._annotations()
        # Folders give no classes.
        self._flat = bool(labels or self.request.unlabeled or annotated is not None)
        images = self._images()
        if labels:
            images = labeled_images(images, labels, self.spec)
        elif annotated is not None:
            where = f"{self.spec}/{ANNOTATIONS}"
            self.request.report(f"{self.spec}: classes are those in {ANNOTATIONS}")
            images = matched_images(images, _annotated(annotated, where), where, self.spec)
        yield from images
        self._warn_of_leftovers()

    def _images(self) -> Iterator[Image]:
        previous = class_name = ""
        for entry in self._entries():
            path, start, size, stamp = entry
            if "/." in f"/{path}":
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
                previous, class_name = folder, class_of(folder)
                self._classes[class_name].add(folder)
            if not self._flat and not folder:
                hint = "give the classes with --labels or --val-labels, or name the folder above"
                raise DataError(f"{self.spec}: {path} is outside any class folder; {hint}")
            yield Image(class_name, name, path, start, size, stamp)

    def _add_other(self, path: str) -> None:
        """Count a file that is no image."""
        folder, _, name = path.rpartition("/")
        if name != ANNOTATIONS or self.request.labels or self.request.unlabeled:
            self._others.add(path)
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
        if self.request.unlabeled:
            return  # what follows is about classes
        filled = set().union(*self._classes.values())
        filled.update(folder.rpartition("/")[0] for folder in self._folders)
        if empty := sorted(self._folders - filled):
            what = counted(
                len(empty), "folder holds no image and gives", "folders hold no image and give"
            )
            self._warn(f"{what} no class: {first_few(empty)}")
        if self._flat:
            return
        self._judge_inner()
        # With --src the parent of train/ and val/, training would use both.
        several = sorted(name for name, where in self._classes.items() if len(where) > 1)
        if several:
            merged = [" + ".join(sorted(self._classes[name])) for name in several]
            what = counted(len(merged), "class is", "classes are")
            self._warn(
                f"{what} merged from several folders: {first_few(merged, 3)}; if these are "
                "splits, name one of them"
            )

    def _judge_inner(self) -> None:
        """Warn of classes that are named by the folder above images/; DataError if unsure."""
        folders = set().union(*self._classes.values())
        inner = {
            folder.rpartition("/")[0] for folder in folders if class_of(folder) != _leaf(folder)
        }
        beside = {
            folder for folder in folders if folder.rpartition("/")[0] in inner or folder in inner
        }
        for folder in sorted(beside):
            if folder in inner or _leaf(folder) != _INNER:
                above = folder if folder in inner else folder.rpartition("/")[0]
                fault = f"{above}/{_INNER} and {folder} hold images: is a class {_leaf(above)} or"
                hint = f"name {above} as the source for the latter, else move the images together"
                raise DataError(f"{self.spec}: {fault} {_INNER}? {hint}")
        if inner:
            what = counted(len(inner), "class is", "classes are")
            named = f"named by the folder above {_INNER}/: {first_few(sorted(inner), 3)}"
            self._warn(f"{what} {named}")


def class_of(folder: str) -> str:
    """Return the class of a folder: its last part, or the one above `images` (Tiny-ImageNet's)."""
    above, _, leaf = folder.rpartition("/")
    return _leaf(above) if above and leaf == _INNER else leaf


def _leaf(folder: str) -> str:
    return folder.rpartition("/")[2]


def _annotated(content: bytes, where: str) -> dict[str, tuple[str, int]]:
    """Return class and line number by the name of an image: `name TAB class TAB box` a line."""
    found: dict[str, tuple[str, int]] = {}
    lines = content.decode("utf-8", "surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not label or "/" in label or name in found:
            fault = "is not `name TAB class TAB box`, or names an image again"
            raise DataError(f"{where}: line {number}: {line!r} {fault}")
        found[name] = label, number
    return found
