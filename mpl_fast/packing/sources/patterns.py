"""Patterns that name several files: `*`, `?`, `[...]`, `{a,b}` and `{0000..0146}`."""

import re
from glob import glob
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few

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
    for name in dict.fromkeys(_expanded(pattern)):
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
    names, rest = [""], pattern
    while braces := _braces(rest):
        start, end = braces
        choices: list[str] = []
        for choice in _choices(rest[start + 1 : end]):
            choices += _expanded(choice)
            if len(choices) * len(names) > _LIMIT:
                raise DataError(f"{pattern}: stands for more than {_LIMIT} files")
        names = [name + rest[:start] + choice for name in names for choice in choices]
        rest = rest[end + 1 :]
    return [name + rest for name in names]


def _braces(text: str) -> tuple[int, int] | None:
    """Return where the first braces that are closed begin and end; others may be inside."""
    opened: list[int] = []
    found: list[tuple[int, int]] = []
    for at, character in enumerate(text):
        if character == "{":
            opened.append(at)
        elif character == "}" and opened:
            found.append((opened.pop(), at))
    return min(found, default=None)


def _choices(inside: str) -> list[str]:
    """Return what is between the commas that are in no braces, or the numbers of a range."""
    if not (ends := _RANGE.fullmatch(inside)):
        choices, depth = [""], 0
        for character in inside:
            depth += (character == "{") - (character == "}")
            if character == "," and not depth:
                choices.append("")
            else:
                choices[-1] += character
        return choices
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= _LIMIT:
        raise DataError(f"{{{inside}}}: stands for more than {_LIMIT} files")
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    width = len(ends[1]) if ends[1][0] == "0" or len(ends[1]) == len(ends[2]) else 0
    return [f"{number:0{width}}" for number in numbers]
