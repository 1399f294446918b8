"""Gives every class its label: by its sorted name, by its number in the sources, or by a file."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal  # int refuses thousands of digits
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.options import PackOptions
from mpl_fast.packing.sources.lists import text_lines
from mpl_fast.packing.sources.source import Source

_LISTED = 10  # classes in a warning
# More classes without an image are refused, if they are also more than so many times the images (or
# the classes with images, of a file): the labels are for other images.
_MANY, _TIMES = 1000, 10
_WORDNET_ID = re.compile(r"n\d{8}")


class LabeledClasses(NamedTuple):
    """The classes of a pack."""

    names: Sequence[str]  # by label
    titles: Sequence[str]  # by label, "" for none; empty if no class has one
    labels: Mapping[str, int]  # by the names in the sources, which may be numbers
    warnings: list[str]


def label_classes(
    train: Sequence[Source],
    val: Source | None,
    trained: set[str],
    held: set[str],
    images: int,
    options: PackOptions,
) -> LabeledClasses:
    """Return the labels of the classes of listed sources.

    trained and held are the names of the classes with training and with validation images; images
    is the number of training images with a label. Warns of classes that lack either, and of a
    single one. Raises DataError for classes that get no label or two.
    """
    spec, order = " + ".join(source.spec for source in train), _class_order(train)
    if options.class_order == "natural" and order is not None:
        raise ConfigError(f"--class-order natural: {spec} numbers its classes itself; leave it out")
    names: Sequence[str] = order if order is not None else _sorted(trained, options.class_order)
    labels = {name: label for label, name in enumerate(names)}
    _require_known(spec, trained - labels.keys(), "the list that numbers the classes")
    titles: list[str] = []
    where = "the training source"
    if options.classes is None and order is None:
        warnings = _numbers_as_texts(spec, names)
    elif options.classes is None:
        warnings = _gaps(spec, names, trained, images)
    else:
        where = str(options.classes)
        names, titles = read_classes(options.classes, labels)
        labels = _labels_by_file(where, names, spec, trained, order)
        used = {labels[name] for name in trained}
        if len(names) > max(_MANY, _TIMES * len(used)):
            raise DataError(
                f"{where}: {len(names)} classes, but {spec} has images of {len(used)}: keep only "
                "the lines of classes that are to have a label"
            )
        warnings = _absent(f"{where}: no training image", names, used, options.out)
    if val is not None:
        labels |= _numbers(val, held, labels, len(names))
        _require_known(val.spec, held - labels.keys(), where)
        used = {labels[name] for name in held}
        warnings += _absent(f"{val.spec}: has no image", names, used, options.out)
    if len(trained | held) == 1:
        what = counted(images, "image with a label is", "images with a label are")
        warnings.append(f"{spec}: all {what} in one class, {min(trained | held)}")
    return LabeledClasses(names, titles if any(titles) else [], labels, warnings)


def natural_key(name: str) -> list[str | Decimal]:
    """Return the key by which timm sorts classes: no case, runs of digits are numbers.

    That of timm 1.0.31 (`timm.utils.misc.natural_key`, used by `timm.data.readers`).
    """
    parts = re.split(r"(\d+)", name.lower())
    return [Decimal(part) if at % 2 else part for at, part in enumerate(parts)]


def read_classes(path: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names and the titles ("" for none) in a file with a line for each label.

    A line is `name` or `name TITLE`. They are separated by the first tab, or in a file without
    tabs by the first space if that gives a WordNet ID or one of the known classes in any line
    which is no known class itself; else a line is a name. DataError names the faulty line.
    """
    lines: list[str] = []
    for number, text in text_lines(path):
        if number != len(lines) + 1:
            raise DataError(
                f"{path}: line {len(lines) + 1} is empty: label {len(lines)} has no name"
            )
        lines.append(text.strip(" "))
    if not lines:
        raise DataError(f"{path}: names no class")
    between = _separator(lines, known)
    numbers: dict[str, int] = {}
    titles = []
    for number, line in enumerate(lines, 1):
        name, _, title = (line, "", "") if line in known else line.partition(between)
        name = name.strip()
        if not name or "/" in name:
            fault = "a class has no / in its name" if name else "a title without a name"
            raise DataError(f"{path}: line {number}: {line!r}: {fault}")
        if numbers.setdefault(name, number) != number:
            raise DataError(f"{path}: line {number}: {name} is on line {numbers[name]} already")
        titles.append(title.strip())
    return list(numbers), titles


def _separator(lines: Sequence[str], known: Collection[str]) -> str:
    if any("\t" in line for line in lines):
        return "\t"
    words = (line.partition(" ")[0] for line in lines if line not in known)
    return " " if any(word in known or _WORDNET_ID.fullmatch(word) for word in words) else "\t"


def _sorted(names: Iterable[str], how: str) -> list[str]:
    if how == "natural":
        return sorted(names, key=lambda name: (natural_key(name), name))
    return sorted(names)


def _numbers_as_texts(spec: str, names: Sequence[str]) -> list[str]:
    """Return a warning if all classes are numbers, but not in their order."""
    pairs = enumerate(pairwise(names)) if all(map(str.isdecimal, names)) else ()
    at = next((at for at, (one, two) in pairs if Decimal(one) > Decimal(two)), None)
    if at is None:
        return []
    return [
        f"{spec}: its numbered classes are sorted as texts, {names[at]} before {names[at + 1]}, as "
        "by torchvision; --class-order natural sorts them as numbers, as timm does"
    ]


def _gaps(spec: str, names: Sequence[str], trained: set[str], images: int) -> list[str]:
    """Return a warning of labels that no training image has; DataError if they are too many.

    Only labels without a name are refused: a list of names may be much longer than a sample of
    images.
    """
    unused = ((label, name) for label, name in enumerate(names) if name not in trained)
    # No list yet: a label may be in the millions.
    if sum(name == str(label) for label, name in unused) > max(_MANY, _TIMES * images):
        what = counted(len(trained), "label", "different labels")
        raise DataError(
            f"{spec}: its labels go up to {len(names) - 1}, but its {counted(images, 'image')} "
            f"have only {what}: each number is a class, so renumber them 0 to {len(trained) - 1}"
        )
    shown = [
        name if name == str(label) else f"{label} ({name})"
        for label, name in enumerate(names)
        if name not in trained
    ]
    what = f"of the labels 0 to {len(names) - 1} {'has' if len(shown) == 1 else 'have'}"
    return [f"{spec}: {len(shown)} {what} no image: {first_few(shown)}"] if shown else []


def _labels_by_file(
    path: str, names: Sequence[str], spec: str, trained: set[str], order: Sequence[str] | None
) -> dict[str, int]:
    """Return the labels by name; order are the names in the sources if these number them."""
    labels = {name: label for label, name in enumerate(names)}
    if order is None:
        _require_known(spec, trained - labels.keys(), path)
        return labels
    if len(order) > len(names):
        fault = f"names {counted(len(names), 'class', 'classes')}"
        raise DataError(f"{path}: {fault}, but {spec} has the labels 0 to {len(order) - 1}")
    for label, name in enumerate(order):
        # A class without a name has its number for one.
        if labels.setdefault(name, label) != label or name not in (str(label), names[label]):
            fault = f"label {label} is {names[label]}, but {name} in {spec}"
            raise DataError(f"{path}: line {label + 1}: {fault}")
    return labels


def _require_known(spec: str, unknown: set[str], where: str) -> None:
    if unknown:
        what = counted(len(unknown), "class is", "classes are")
        raise DataError(f"{spec}: {what} not in {where}: {first_few(sorted(unknown))}")


def _absent(what: str, names: Sequence[str], used: set[int], out: Path) -> list[str]:
    """Return a warning if there are classes whose labels are not used."""
    absent = [name for label, name in enumerate(names) if label not in used]
    if not absent:
        return []
    more = f"; all: make_rec.py info --classes {out}" if len(absent) > _LISTED else ""
    few = first_few(absent, _LISTED)
    return [f"{what} of {len(absent)} of the {len(names)} classes: {few}{more}"]


def _class_order(sources: Sequence[Source]) -> tuple[str, ...] | None:
    """Return the class names by label if sources number their labels; None: sort by name."""
    orders = [(source.spec, source.class_order) for source in sources]
    longest = max((order for _, order in orders if order is not None), key=len, default=None)
    for spec, order in orders:
        if longest is not None and order is not None and order != longest[: len(order)]:
            raise DataError(f"{spec}: its labels mean other classes than another source's")
    return longest or None


def _numbers(
    val: Source, held: set[str], labels: Mapping[str, int], classes: int
) -> dict[str, int]:
    """Return the labels by number if a validation source has only these: a list of a flat folder.

    DataError when classes are called by numbers, too, but not by their labels.
    """
    order = val.class_order or ()
    if not 0 < len(order) <= classes or order != tuple(map(str, range(len(order)))):
        return {}
    known = held & labels.keys()
    other = [name for name in sorted(known) if labels[name] != int(name)]
    if other:
        raise DataError(
            f"{val.spec}: its labels are numbers, and so are the names of the training classes, in "
            f"another order (class {other[0]} has label {labels[other[0]]}); give it class "
            "folders or --val-labels"
        )
    return {} if known else {str(label): label for label in range(classes)}
