"""Reads labels files: the classes of images outside class folders."""

import csv
import re
from collections.abc import Callable, Sequence
from decimal import Decimal  # int refuses thousands of digits
from pathlib import Path

from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES
from mpl_fast.packing.sources.labels import LabelLine, Labels
from mpl_fast.packing.sources.lists import text_lines

_DEVKIT_CLASSES = 1000
# Titles of columns, in lower case and without spaces, _ and -.
_NAMES = re.compile(
    r"(images?|img|photo|picture|files?)(id|name|path|file|filename)?|id|f?name|path|uuid"
)
_CLASSES = re.compile(
    r"(label|class|category)(e?s|id|name)?|cls|target|breed|species|wnid|synset|predictionstring"
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_UNDECODED = re.compile(r"[\ud800-\udfff]")  # bytes that are not UTF-8
_BOX = 4  # numbers behind the class


def read_labels(path: Path, report: Callable[[str], None]) -> Labels:
    """Return the content of a labels file.

    Its lines are `name class`, or a class each, for the images in the order of their names. Columns
    are separated by tabs, by commas, where quotes are those of CSV, or by the last space. A first
    line may be a header, and must be where there are more than two columns. Boxes of four numbers
    behind the class, as Kaggle's ImageNet has, are left out. The class -1 is no label.
    """
    lines: list[LabelLine] = []
    columns, column, boxes = 0, 1, 0
    for number, text in text_lines(path):
        where = f"{path}: line {number}"
        if not columns:
            _refuse_other_forms(path, text)
        fields = _fields(text, where)
        if not columns:
            columns, is_header = len(fields), bool(_NAMES.fullmatch(_plain(fields[0])))
            column = _class_column(fields, is_header, where)
            if is_header:
                report(f"{where} is its header: {_titles(fields, column)}")
                continue
        if len(fields) != columns:
            raise DataError(f"{where}: {text!r}: {len(fields)} columns, but {columns} before")
        name, label = fields[0], _without_boxes(fields[column], f"{where}: {fields[0]}")
        boxes += label != fields[column]
        if name and not label:
            fault = "has no class: leave the line out, or write -1 for an unlabeled image"
            raise DataError(f"{where}: {name} {fault}")
        if not label or (lines and bool(name) != bool(lines[0].path)):
            raise DataError(f"{where}: {text!r}: each line must be `name class`, or each a class")
        if not label.isascii() and _UNDECODED.search(label):
            raise DataError(f"{path}: not UTF-8: line {number}; convert the file")
        if "/" in label:
            raise DataError(f"{where}: a class with a slash in it: {label!r}")
        lines.append(LabelLine(number, name, "" if label == str(NO_LABEL) else label))
    if not lines:
        raise DataError(f"{path}: gives no class")
    _refuse_devkit_ids(path, lines)
    if boxes:
        report(f"{path}: {counted(boxes, 'line has', 'lines have')} boxes, which are not used")
    return Labels(str(path), lines)


def _refuse_other_forms(path: Path, text: str) -> None:
    """DataError when the first line is not that of a labels file."""
    if "\0" in text or path.suffix.lower() in (".json", ".jsonl"):
        fault = "a text file is needed, with `name class` on each line, or a CSV with a header"
        raise DataError(f"{path}: {fault}")
    first, semicolon, _ = text.partition(";")
    is_name = _NAMES.fullmatch(_plain(first)) or first.lower().endswith(IMAGE_SUFFIXES)
    if semicolon and is_name and not {"\t", ","} & {*text}:
        raise DataError(f"{path}: lines are separated by ';': use a comma or a tab")


def _fields(text: str, where: str) -> list[str]:
    """Return the columns of a line; the first is empty if the line is a class only."""
    if "\t" in text:
        fields = text.split("\t")
    elif "," in text:
        try:
            (fields,) = csv.reader([text], strict=True, skipinitialspace=True)
        except csv.Error as error:
            raise DataError(f"{where}: {text!r}: {error}") from error
    else:
        name, _, label = text.strip().rpartition(" ")
        fields = [name, label]
    return [field.strip() for field in fields]


def _class_column(fields: Sequence[str], header: bool, where: str) -> int:
    """Return which column has the classes, by the fields of the first line."""
    if len(fields) == 2:
        return 1
    found = [at for at, title in enumerate(fields) if at and _CLASSES.fullmatch(_plain(title))]
    if header and len(found) == 1:
        return found[0]
    what = f"{len(fields)} columns ({first_few(fields)})"
    if not header:
        hint = "name them in a first line, as id,label,..., or keep `name class`"
        raise DataError(f"{where}: {what} without a header: {hint}")
    several = "several columns may be" if found else "no column is named as"
    raise DataError(f"{where}: {several} the class among {what}: name one of them label")


def _titles(fields: Sequence[str], column: int) -> str:
    unused = first_few([title for at, title in enumerate(fields) if at not in (0, column)])
    rest = f"; columns not used: {unused}" if unused else ""
    return f"names in {fields[0]}, classes in {fields[column]}{rest}"


def _without_boxes(label: str, where: str) -> str:
    """Return the class in `class x y x y [class x y x y ...]`, or the label as it is."""
    words = label.split()
    names = words[:: _BOX + 1]
    numbers = [word for at, word in enumerate(words) if at % (_BOX + 1)]
    if len(numbers) != _BOX * len(names) or not numbers:
        return label
    # A number before numbers is not the class of a box, but one of several labels.
    if any(map(_NUMBER.fullmatch, names)) or not all(map(_NUMBER.fullmatch, numbers)):
        return label
    if len(set(names)) > 1:
        raise DataError(f"{where} has boxes of several classes: {first_few(sorted(set(names)))}")
    return names[0]


def _refuse_devkit_ids(path: Path, lines: Sequence[LabelLine]) -> None:
    def is_id(label: str) -> bool:
        return label.isdecimal() and 0 < Decimal(label) <= _DEVKIT_CLASSES

    if all(not line.path and is_id(line.label) for line in lines):
        raise DataError(
            f"{path}: these look like the ILSVRC devkit's numbers, which do not follow the "
            "order of the class names: give a WordNet id, as n01440764, on each line"
        )


def _plain(title: str) -> str:
    return re.sub(r"[ _-]", "", title.lower())
