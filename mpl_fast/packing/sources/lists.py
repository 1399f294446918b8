"""MXNet's .lst as a source: id, label and path of each image."""

import os
import stat
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mpl_fast.data.records import LABEL_LIMIT, NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted
from mpl_fast.packing.sources.source import FOLDER, Image, Request, Source

# More classes are refused where they are also more than so many times the images.
_NUMBERED, _TIMES = 1 << 18, 10


class Line(NamedTuple):
    """One line of a .lst."""

    number: int  # from 1
    id: int
    label: int  # NO_LABEL if the image has none
    path: str  # as written in the list


class ListSource(Source):
    """The image files that a .lst names, all below one folder."""

    kind = FOLDER
    suffixes = (".lst",)
    has_labels = True

    def __init__(self, request: Request) -> None:
        path = request.path
        root = request.root or path.parent
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; the images listed in {path} must be below it")
        super().__init__(request, root)

    def _list(self) -> Iterator[Image]:
        list_path, labels = self.request.path, not self.request.unlabeled
        names = class_names(list_path) if labels else ()
        self.class_order = names or None
        _require_unique(list_path, self.file, labels=labels)
        missing = Tally()
        for line in read_list(list_path, labels=labels):
            path = _below(self.file, line, list_path)
            state = _state(f"{self.file}/{path}")
            if state is None:
                missing.add(f"{path} (line {line.number})")
                continue
            name = path.rpartition("/")[2]
            class_name = "" if line.label == NO_LABEL else names[line.label]
            yield Image(class_name, name, path, -1, state.st_size, state.st_mtime_ns)
        if missing.count:
            what = counted(missing.count, "file is", "files are")
            raise DataError(f"{list_path}: {what} not in {self.file}: {missing}")


def whole_label(label: str | float) -> int:
    """Return a label ("16", "16.000000", "1e3") as a class index; ValueError if it is none.

    A label of -1 is that of an image without one, NO_LABEL.
    """
    try:
        number = float(label)
    except ValueError as error:
        raise ValueError(f"label {label!r} is no number") from error
    if not number.is_integer() or not NO_LABEL <= number < LABEL_LIMIT:
        limits = f"0..{LABEL_LIMIT - 1} (or -1: no label)"
        raise ValueError(f"label {label} is no whole number in {limits}")
    return int(number)


def class_numbers(highest: int, images: int, where: object) -> tuple[str, ...]:
    """Return a name for each label up to the highest: its number.

    DataError, before they take memory, when they are too many for so many images.
    """
    if highest >= max(_NUMBERED, _TIMES * images):
        what = counted(images, "image")
        fault = f"its labels go up to {highest}, but it has only {what}"
        raise DataError(f"{where}: {fault}: each number is a class, so renumber them from 0")
    return tuple(map(str, range(highest + 1)))


def read_list(path: Path, *, labels: bool = True) -> Iterator[Line]:
    """Yield the lines of a .lst, `id TAB label TAB path`; DataError names the faulty line.

    Without labels only the path is needed, the last column of a line.
    """
    known: dict[str, int] = {}  # few, on many lines
    for number, text in text_lines(path):
        columns = text.split("\t")
        if not labels:
            has_id = len(columns) > 1 and columns[0].isdecimal()
            yield Line(number, int(columns[0]) if has_id else -1, NO_LABEL, columns[-1])
            continue
        try:
            if len(columns) < 3 or not columns[-1]:
                raise ValueError(f"{text!r} is not `id TAB label TAB path`")
            if len(columns) > 3:
                raise ValueError(f"{len(columns) - 2} labels, but only one an image can be packed")
            record_id, label, name = columns
            if not record_id.isdecimal():
                raise ValueError(f"id {record_id!r} is no whole number")
            if label not in known:
                known[label] = whole_label(label)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        yield Line(number, int(record_id), known[label], name)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank, without line end or byte order mark.

    Only LF and CR LF end a line: a file name may contain any other character.
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
    """Return the class names by label, taken from the folders in a .lst.

    A label whose images are all in one folder is named by that folder, any other by its number.
    If two labels would get the same name, all are named by their numbers.
    """
    folders: dict[int, str] = {}  # "": several
    images = 0
    for line in read_list(path):
        images += 1
        if line.label == NO_LABEL:
            continue
        folder = line.path.rpartition("/")[0].rpartition("/")[2]
        if folders.setdefault(line.label, folder) != folder:
            folders[line.label] = ""
    if not images:
        raise DataError(f"{path}: lists no image")
    numbers = class_numbers(max(folders, default=-1), images, path)
    names = [folders.get(label) or number for label, number in enumerate(numbers)]
    return tuple(names) if len(set(names)) == len(names) else numbers


def _state(path: str) -> os.stat_result | None:
    """Return the stat of a regular file, else None."""
    try:
        state = os.stat(path)  # noqa: PTH116 (a Path for each image takes twice the time)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def _below(root: Path, line: Line, path: Path) -> str:
    """Return a listed path relative to root; links are not resolved here."""
    name = os.path.normpath(line.path)
    if name.startswith("/"):
        name = os.path.relpath(name, root.absolute())
    if name.startswith("../") or name in ("..", "."):
        raise DataError(f"{path}: line {line.number}: {line.path} is not below {root}; see --root")
    return name


def _require_unique(path: Path, root: Path, *, labels: bool) -> None:
    """DataError when a .lst names a file twice; uses 8 bytes of memory per line."""
    import numpy as np  # late: the command line's --help must not wait for it

    lines = partial(read_list, path, labels=labels)
    hashes = array("q", (hash(_below(root, line, path)) for line in lines()))
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, int] = {}
    for line in lines() if twice else ():
        name = _below(root, line, path)
        if hash(name) in twice and first.setdefault(name, line.number) != line.number:
            raise DataError(f"{path}: line {line.number}: {name} is on line {first[name]} already")
