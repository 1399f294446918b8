"""Sources in which the folder of an image file names its class, or a labels file does."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import Tally, counted, first_few
from mpl_fast.packing.sources.labels_file import labeled_images
from mpl_fast.packing.sources.source import IMAGE_SUFFIXES, Image, Source


class Entry(NamedTuple):
    """A file or folder below a source."""

    path: str  # inside the source, with "/" between its parts
    start: int  # as in Image
    size: int  # bytes; -1 for a folder
    stamp: int = 0


class ClassFolders(Source):
    """Files and folders, of which those named as images are packed and hidden ones ignored."""

    @abstractmethod
    def _entries(self) -> Iterator[Entry]:
        """Yield all files and folders."""

    def _list(self) -> Iterator[Image]:
        self._others = Tally(3)
        self._folders: set[str] = set()
        self._classes: dict[str, set[str]] = defaultdict(set)  # the folders of each
        images, labels = self._images(), self.request.labels
        yield from labeled_images(images, labels, self.spec) if labels else images
        self._warn_of_leftovers()

    def _images(self) -> Iterator[Image]:
        previous = class_name = ""
        for path, start, size, stamp in self._entries():
            if "/." in f"/{path}":
                continue
            if size < 0:
                self._folders.add(path)
                continue
            if not path.lower().endswith(IMAGE_SUFFIXES):
                self._others.add(path)
                continue
            folder, _, name = path.rpartition("/")
            if folder != previous:
                previous, class_name = folder, folder.rpartition("/")[2]
                self._classes[class_name].add(folder)
            if not (self.request.labels or self.request.unlabeled or folder):
                hint = "give the classes with --labels or --val-labels, or name the folder above"
                raise DataError(f"{self.spec}: {path} is outside any class folder; {hint}")
            yield Image(class_name, name, path, start, size, stamp)

    def _warn_of_leftovers(self) -> None:
        if count := self._others.count:
            what = counted(count, "file is not an image", "files are not images")
            self._warn(f"{what} by name, left out: {self._others}")
        if self.request.unlabeled:
            return  # what follows is about classes
        filled = set().union(*self._classes.values())
        filled.update(folder.rpartition("/")[0] for folder in self._folders)
        if empty := sorted(self._folders - filled):
            what = counted(
                len(empty), "folder holds no image and gives", "folders hold no image and give"
            )
            self._warn(f"{what} no class: {first_few(empty)}")
        # With --src the parent of train/ and val/, training would use both.
        several = sorted(name for name, where in self._classes.items() if len(where) > 1)
        if several and not self.request.labels:
            merged = [" + ".join(sorted(self._classes[name])) for name in several]
            what = counted(len(merged), "class is", "classes are")
            self._warn(
                f"{what} merged from several folders: {first_few(merged, 3)}; if these are "
                "splits, name one of them"
            )
