"""Which of the folders above an image is its class: as --class-from states, or where certain."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from os.path import commonpath

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few

_INNER = "images"  # a folder of this name inside a class folder is no class
_ROLES = {  # by how the name of a split begins
    "train": "--src",
    "val": "--val",
    "dev": "--val",
    "test": "--val",
    "unlabel": "--unlabeled-src",
    "extra": "--src",
}
_LABELS = {  # where folders give no classes
    "--src": " with --labels (or as --unlabeled-src)",
    "--val": " with --val-labels",
}
_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|unlabell?ed|extra)"
    r"([ _-]?(set|data|images|\d+))?",
    re.IGNORECASE,
)


def class_path(folder: str, class_from: str | None) -> str:
    """Return a folder's path as far as the class; "" if it has too few parts.

    class_from is "top", "leaf" or a number of parts. If None, the class is the last part, or the
    one above a last part `images` (Tiny-ImageNet's).
    """
    if class_from == "leaf":
        return folder
    if not class_from:
        above, _, leaf = folder.rpartition("/")
        return above if above and leaf == _INNER else folder
    depth = level(class_from)
    parts = folder.split("/")
    return "/".join(parts[:depth]) if len(parts) >= depth else ""


def class_of(folder: str, class_from: str | None) -> str:
    """Return the class of a folder, "" if it has none; class_from as in `class_path`."""
    return class_path(folder, class_from).rpartition("/")[2]


def level(class_from: str | None) -> int:
    """Return how many folders an image needs above it."""
    return int(class_from) if class_from and class_from.isdecimal() else 1


def require_certain(counts: Mapping[str, int], spec: str, inside: str) -> str:
    """Return which folders are the classes, "" if all are; DataError unless that is certain.

    It is where all images are equally deep and share all folders above that of the class. counts
    has the number of images of each folder; spec and inside begin messages and paths of folders.
    """
    paths = {folder: class_path(folder, None) for folder in counts}
    parents = {_above(path) for path in paths.values()}
    above = commonpath(parents)
    top = str(above.count("/") + 2) if above else "top"
    first = _sizes(counts, top)
    splits = sorted(filter(_SPLIT.fullmatch, first))
    if 2 * len(splits) > len(first):
        below = f"{inside}{above}/" if above else inside
        flat = {path.rpartition("/")[2] for path in paths.values() if _above(path) == above}
        raise DataError(f"{spec}: {_not_classes(splits, flat, below, top)}")
    inner = {folder != path for folder, path in paths.items()}
    if len(parents) > 1 or len(inner) > 1:
        where = f" below {above}/" if above else ""
        raise DataError(
            f"{spec}: which folders are the classes, the first ones{where} ({_shown(first)}) or "
            f"the last ones ({_shown(_sizes(counts, 'leaf'))})? "
            f"give --class-from {top}, leaf or the number of a folder"
        )
    where = " and ".join([f"below {above}/"] * bool(above) + [f"above {_INNER}/"] * any(inner))
    return f"classes are the folders {where}" if where else ""


def class_warnings(counts: Mapping[str, int], class_from: str | None) -> Iterator[str]:
    """Yield a line for classes of several folders, and for those that hardly are classes."""
    folders: dict[str, set[str]] = defaultdict(set)
    for folder in counts:
        folders[class_of(folder, class_from)].add(class_path(folder, class_from))
    merged = [" + ".join(sorted(where)) for _, where in sorted(folders.items()) if len(where) > 1]
    if merged:
        what = counted(len(merged), "class is", "classes are")
        yield (
            f"{what} merged from several folders: {first_few(merged, 3)}; if these are splits, "
            "name one of them"
        )
    if odd := sorted(name for name in folders if _SPLIT.fullmatch(name) or name == _INNER):
        what = counted(len(odd), "class is", "classes are")
        yield f"{what} named as splits or folders of images are: {first_few(odd)}"


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _sizes(counts: Mapping[str, int], class_from: str | None) -> Counter[str]:
    """Return the number of images of each class."""
    sizes: Counter[str] = Counter()
    for folder, count in counts.items():
        sizes[class_of(folder, class_from)] += count
    return sizes


def _shown(sizes: Mapping[str, int]) -> str:
    few = first_few((f"{name} {count}" for name, count in sorted(sizes.items())), 4)
    return f"{len(sizes)}: {few}"


def _not_classes(splits: list[str], flat: set[str], below: str, top: str) -> str:
    """Return which folders below are splits, and as what to give them; flat have no classes."""
    given: dict[str, str] = {}
    for start, option in _ROLES.items():
        for name in splits:
            if name.lower().startswith(start):
                labels = _LABELS.get(option, "") if name in flat else ""
                given.setdefault(option, f"{below}{name} as {option}{labels}")
    one = len(splits) == 1
    what = "is a split, not a class" if one else "are splits, not classes"
    otherwise = "it is a class" if one else "they are classes"
    return (
        f"{first_few(splits, between=' and ')} {what}: give {' and '.join(given.values())}; "
        f"if {otherwise}, give --class-from {top}"
    )
