"""Patterns that name several files: `*`, `?`, `[...]`, `{a,b}` and `{0000..0146}`."""

import re
from glob import glob
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import counted, first_few

_WILD = re.compile(r"[*?[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LIMIT = 1_000_000  # files


def matching_files(pattern: str) -> tuple[Path, ...]:
    """Return the files that a pattern names, in its order; () if it is none, or there are none.

    Raises DataError when some of those that its braces name are missing.
    """
    if not _WILD.search(pattern) and not _BRACES.search(pattern):
        return ()
    files: dict[Path, None] = {}
    missing = []
    for name in _expanded(pattern):
        # Not Path.glob: it has no absolute patterns.
        found = sorted(glob(name, recursive=True)) if _WILD.search(name) else [name]  # noqa: PTH207
        paths = [path for path in map(Path, found) if path.is_file()]
        if not paths:
            missing.append(name)
        files.update(dict.fromkeys(paths))
    if files and missing:
        what = counted(len(missing), "name", "names")
        raise DataError(f"{pattern}: no file fits {what} of this pattern: {first_few(missing, 3)}")
    return tuple(files)


def _expanded(pattern: str) -> list[str]:
    """Return what braces stand for, as in a shell."""
    names = [pattern]
    while braces := _BRACES.search(names[0]):
        choices = _choices(braces[1])
        if len(choices) * len(names) > _LIMIT:
            raise DataError(f"{pattern}: stands for more than {_LIMIT} files")
        split = [_BRACES.split(name, maxsplit=1) for name in names]
        names = [start + choice + rest for start, _, rest in split for choice in choices]
    return names


def _choices(inside: str) -> list[str]:
    if not (ends := _RANGE.fullmatch(inside)):
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= _LIMIT:
        raise DataError(f"{{{inside}}}: stands for more than {_LIMIT} files")
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    width = len(ends[1]) if ends[1][0] == "0" or len(ends[1]) == len(ends[2]) else 0
    return [f"{number:0{width}}" for number in numbers]
