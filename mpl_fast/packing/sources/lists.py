"""Text files that say what images there are and of which class: .lst lists and labels files."""

import os
import stat
from array import array
from bisect import insort
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import DataError

LABEL_LIMIT = 1 << 24  # a label is a float32, which holds every whole number below this
_DEVKIT_CLASSES = 1000


class Tally:
    """How many entries there are, and the first few of them in order: a long list, not kept."""

    def __init__(self, most: int = 10) -> None:
        self.count = 0
        self._most = most
        self._first: list[str] = []

    def add(self, entry: str) -> None:
        """Count an entry."""
        self.count += 1
        insort(self._first, entry)
        del self._first[self._most :]

    def __str__(self) -> str:
        more = self.count - len(self._first)
        return ", ".join(self._first) + (f" and {more} more" if more else "")


class Line(NamedTuple):
    """One line of a .lst: an image, its id and its label."""

    number: int  # from 1
    id: int
    label: int
    path: str  # as it is written


class ListedFile(NamedTuple):
    """A file that a .lst names."""

    label: int
    path: str  # below the root, with "/"
    size: int  # bytes
    stamp: int  # modification time, ns


def whole_label(label: str | float) -> int:
    """Return a label as a class index ("16", "16.000000", "1e3"); ValueError when it is none."""
    try:
        number = float(label)
    except ValueError as error:
        raise ValueError(f"label {label!r} is no number") from error
    if not number.is_integer() or not 0 <= number < LABEL_LIMIT:
        raise ValueError(f"label {label} is no whole number in 0..{LABEL_LIMIT - 1}")
    return int(number)


def read_list(path: Path) -> Iterator[Line]:
    """Yield the lines of a .lst, `id TAB label TAB path`; DataError names the line at fault."""
    labels: dict[str, int] = {}  # few, on many lines
    for number, text in _lines(path):
        try:
            record_id, label, name = _columns(text)
            if label not in labels:
                labels[label] = whole_label(label)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        yield Line(number, record_id, labels[label], name)


def _columns(text: str) -> tuple[int, str, str]:
    columns = text.split("\t")
    if len(columns) < 3 or not columns[-1]:
        raise ValueError(f"{text!r} is not `id TAB label TAB path`")
    if len(columns) > 3:
        raise ValueError(f"{len(columns) - 2} labels, but only one an image can be packed")
    if not columns[0].isdecimal():
        raise ValueError(f"id {columns[0]!r} is no whole number")
    return int(columns[0]), columns[1], columns[2]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank, without line end or byte order mark.

    Only LF and CR LF end a line: a file name may hold any other character.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                text = line.rstrip("\r\n")
                if text and not text.isspace():
                    yield number, text
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def class_names(path: Path) -> tuple[str, ...]:
    """Return the class names by label that a .lst suggests by its folders.

    A label's class is the folder of all its images, if no other label has images in one of that
    name; else, and for a label without images, it is the label's number as text.
    """
    folders: dict[int, str] = {}  # "": several
    for line in read_list(path):
        folder = line.path.rpartition("/")[0].rpartition("/")[2]
        if folders.setdefault(line.label, folder) != folder:
            folders[line.label] = ""
    if not folders:
        raise DataError(f"{path}: lists no image")
    numbers = [str(label) for label in range(max(folders) + 1)]
    names = [folders.get(label) or number for label, number in enumerate(numbers)]
    return tuple(names if len(set(names)) == len(names) else numbers)


def listed_files(path: Path, root: Path) -> Iterator[ListedFile]:
    """Yield the files that a .lst names below root.

    DataError when a path leaves root, is listed twice, or (after the last) when files are missing.
    """
    _require_unique(path, root)
    missing = Tally()
    for line in read_list(path):
        relative = _below(root, line, path)
        state = _state(f"{root}/{relative}")
        if state is None:
            missing.add(f"{relative} (line {line.number})")
        else:
            yield ListedFile(line.label, relative, state.st_size, state.st_mtime_ns)
    if missing.count:
        raise DataError(f"{path}: {missing.count} files are not in {root}: {missing}")


def _state(path: str) -> os.stat_result | None:
    """Return what the system says of a file; None when there is none, or a folder."""
    try:
        state = os.stat(path)  # noqa: PTH116 (a Path for each image takes twice the time)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def _below(root: Path, line: Line, path: Path) -> str:
    """Return a listed path as one below root; links are followed only later, when it is read."""
    name = os.path.normpath(line.path)
    if name.startswith("/"):
        name = os.path.relpath(name, root.absolute())
    if name.startswith("../") or name in ("..", "."):
        raise DataError(f"{path}: line {line.number}: {line.path} is not below {root}; see --root")
    return name


def _require_unique(path: Path, root: Path) -> None:
    """DataError when a .lst names a file twice; 8 bytes of memory a line."""
    import numpy as np  # late: the command line's --help must not wait for it

    hashes = array("q", (hash(_below(root, line, path)) for line in read_list(path)))
    if not hashes:
        return
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, int] = {}
    for line in read_list(path) if twice else ():
        name = _below(root, line, path)
        if hash(name) in twice and first.setdefault(name, line.number) != line.number:
            raise DataError(f"{path}: line {line.number}: {name} is on line {first[name]} already")


class Labels:
    """The classes that a labels file gives to images that lie in no class folder.

    Its lines are `name class` (with tab, comma or space between), or one class each for the images
    in the order of their names. They are held in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_order: list[str] = []
        self._by_name: dict[str, tuple[str, int]] = {}  # class and line
        self._taken: dict[str, None] = {}
        self._faults = Tally()
        for number, text in _lines(path):
            self._add(number, text)
        if not self._in_order and not self._by_name:
            raise DataError(f"{path}: gives no class")
        if _are_devkit_ids(self._in_order):
            raise DataError(
                f"{path}: these look like the ILSVRC devkit's numbers, which do not follow the "
                "order of the class names: give a WordNet id, as n01440764, on each line"
            )

    @property
    def in_order(self) -> bool:
        """Whether each line is a class only: images must then be taken in the order of names."""
        return bool(self._in_order)

    def _add(self, number: int, text: str) -> None:
        name, class_name = _name_and_class(text)
        where = f"{self._path}: line {number}"
        if not class_name or (self._in_order if name else self._by_name):
            raise DataError(f"{where}: {text!r}: each line must be `name class`, or each a class")
        if "/" in class_name:
            raise DataError(f"{where}: a class with a slash in it: {class_name!r}")
        if name in self._by_name:
            raise DataError(f"{where}: {name} is on line {self._by_name[name][1]} already")
        if name:
            self._by_name[name] = class_name, number
        else:
            self._in_order.append(class_name)

    def take(self, name: str) -> str | None:
        """Return the class of the next image; None when there is none, told at the end."""
        twice = name in self._taken
        at = len(self._taken)
        self._taken[name] = None
        if twice:
            self._faults.add(f"{name} (several images)")
        elif self.in_order and at < len(self._in_order):
            return self._in_order[at]
        elif name in self._by_name:
            return self._by_name[name][0]
        else:
            self._faults.add(f"{name} (no line)")
        return None

    def require_all_taken(self, spec: str) -> None:
        """DataError when there were images without a line, or lines without an image."""
        for name, (_, number) in self._by_name.items():
            if name not in self._taken:
                self._faults.add(f"{name} (line {number}, no image)")
        for number in range(len(self._taken), len(self._in_order)):
            self._faults.add(f"class {number + 1} (no image)")
        if self._faults.count:
            fault = f"{self._faults.count} names do not fit the images of {spec}"
            raise DataError(f"{self._path}: {fault}: {self._faults}")


def _name_and_class(text: str) -> tuple[str, str]:
    """Return the name without folders, "" on a line with a class only, and the class."""
    between = next((character for character in "\t," if character in text), None)
    name, _, class_name = text.rpartition(between) if between else text.strip().rpartition(" ")
    return name.strip().rpartition("/")[2], class_name.strip()


def _are_devkit_ids(classes: list[str]) -> bool:
    numbers = all(name.isdecimal() and 0 < int(name) <= _DEVKIT_CLASSES for name in classes)
    return bool(classes) and numbers
