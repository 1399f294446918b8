"""The interface of a source of images: a subclass of `Source`, listed in `kinds.py`."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mpl_fast.errors import DataError

if TYPE_CHECKING:
    from mpl_fast.packing.sources.labels import Labels

FOLDER = "folder"  # the kind of all sources whose images are files of their own
SHARDS = "shards"  # of sources whose images are byte ranges of several files in one folder
IN_SHARD = "//"  # between a file and what is in it, in the path of an image of such a source


class Image(NamedTuple):
    """One image: its class, its file name, and the byte range of its content."""

    class_name: str  # "": it has no label
    name: str  # without folders
    path: str  # inside its source, with "/"
    start: int  # byte offset in the source's file; -1: it is a file of its own
    size: int  # bytes of that range
    stamp: int  # modification time in ns of a file of its own, or of its shard; else 0


class Request(NamedTuple):
    """A --src or --val that is to be opened, and the options that apply to it."""

    spec: str  # as the user wrote it
    path: Path  # the file or folder in it
    folder: str  # of `ARCHIVE:FOLDER`, else ""
    root: Path | None  # of the paths in a list; None: the list's folder
    labels: "Labels | None"  # the classes of images outside class folders
    work: Path  # the folder into which files may be unpacked
    report: Callable[[str], None]  # prints a line
    unlabeled: bool = False  # --unlabeled-src: classes are not used, and none is demanded
    files: tuple[Path, ...] = ()  # that the pattern in it names; then path is the first
    partial: bool = False  # images without a line in labels are those of an --unlabeled-src
    class_from: str | None = None  # which folder is the class; None: the one that certainly is


class Source(ABC):
    """A folder of image files, or a file (or several: SHARDS) of which images are byte ranges.

    A new kind sets `kind`, lists its images in `_list`, and stands in `kinds.KINDS`. If its images
    are no byte ranges of what the user gave, its constructor writes a file of them (spool.py,
    `UnpackedSource`); if they are encoded there, it has a `decode`, which is static because it is
    called by worker processes, which have only kind, file and byte ranges.

    An image without a label has class "". With `request.unlabeled` classes are not used: a source
    yields its images whether it finds a class or not, and does not warn of classes.
    """

    kind: ClassVar[str]  # stored in packs
    suffixes: ClassVar[tuple[str, ...]] = ()  # of files of this kind
    has_labels: ClassVar[bool] = False  # labels of its own: a labels file is an error
    has_folders: ClassVar[bool] = False  # `FILE:FOLDER` names a part of it
    # Why several images may have the same path, and the remedy.
    same_names = "keep one image of each"
    behind: ClassVar[int] = 0  # bytes after the range of an image that `decode` is given as well

    def __init__(self, request: Request, file: Path | None = None) -> None:
        """Open the source; file is what images are read from, by default the path of the request.

        Raises DataError, or ConfigError for an option.
        """
        self.request = request
        self.spec = request.spec
        self.file = file or request.path
        state = self.file.stat()
        one_file = self.kind not in (FOLDER, SHARDS)
        self.size, self.stamp = (state.st_size, state.st_mtime_ns) if one_file else (0, 0)
        self.warnings: list[str] = []  # complete at the end of images()
        # At the end of images(): class names by label if the source numbers its labels, else None.
        self.class_order: tuple[str, ...] | None = None

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether a path is of this kind."""
        return path.suffix in cls.suffixes

    @cached_property
    def place(self) -> str:
        """The path of its file or folder without links, and a "/"."""
        return os.path.join(os.path.realpath(self.file), "")  # noqa: PTH118 (keeps the "/")

    @property
    def by_folder(self) -> bool:
        """Whether the folders of its images give their classes."""
        return False

    @abstractmethod
    def _list(self) -> Iterator[Image]:
        """Yield all images in any order, without holding them in memory.

        Calls _warn and sets class_order where there is reason to. Raises DataError.
        """

    @staticmethod
    def decode(stored: bytes) -> bytes:
        """Return the image that the bytes of its range, and those behind, are; or DataError."""
        return stored

    def images(self) -> Iterator[Image]:
        """Yield all images in any order; DataError if there are none or one cannot be packed.

        Memory does not grow with their number, except for 8 bytes per line of a .lst and the
        content of a labels file.
        """
        self.warnings.clear()
        empty = True
        for image in self._list():
            empty = False
            key = f"{image[0]}/{image[1]}"  # class and name
            if not key.isprintable():  # a tab and a line break are not
                require_one_line(key, image.path, self.spec)
            yield image
        if empty:
            raise DataError("; ".join((self._nothing(), *self.warnings)))

    def _warn(self, text: str) -> None:
        self.warnings.append(f"{self.spec}: {text}")

    def _nothing(self) -> str:
        if (self.file / "manifest.json").is_file():
            return f"{self.spec}: no image found; of packed records, name the .rec files"
        return f"{self.spec}: no image found (by suffix or first bytes)"


def require_one_line(key: str, path: str, spec: str) -> None:
    """DataError when the name of an image would break the lines of a .lst."""
    if "\t" in key or "\n" in key or "\r" in key:
        raise DataError(f"{spec}: {path!r} has a tab or line break in its name")
