"""Chooses labeled images by a list of names."""

from collections.abc import Iterable
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.sources.lists import text_lines


def choose_named(images: Iterable[tuple[int, str, str]], path: Path) -> set[int]:
    """Return the ids of the images named in a list; memory grows with the list only.

    An image is named by a whole line, or else by its first word. Raises DataError when a line fits
    no image or several, when two fit the same, or when a class has no labeled image.
    """
    lines = _listed_names(path)
    keys = [(_image_name(line), _image_name(line.split()[0])) for line in lines]
    found: dict[str, list[int]] = {key: [] for pair in keys for key in pair}
    class_of: dict[int, str] = {}
    classes: set[str] = set()
    for record_id, class_name, name in images:
        classes.add(class_name)
        for key in (name, f"{class_name}/{name}"):
            if key in found:
                found[key].append(record_id)
                class_of[record_id] = class_name
    chosen: set[int] = set()
    unknown, ambiguous, twice = [], [], []
    for (whole, word), line in zip(keys, lines, strict=True):
        ids = found[whole] or found[word]
        if not ids:
            unknown.append(line)
        elif len(ids) > 1:
            ambiguous.append(line)
        elif ids[0] in chosen:
            twice.append(line)
        chosen.update(ids)
    without = sorted(classes - {class_of[record_id] for record_id in chosen})
    several = "images of several classes (write class/name)"
    for listed, one, many in (
        (unknown, "name fits no image", "names fit no image"),
        (ambiguous, f"name fits {several}", f"names fit {several}"),
        (twice, "name is listed more than once", "names are listed more than once"),
        (without, "class has no labeled image", "classes have no labeled image"),
    ):
        if listed:
            what = counted(len(listed), one, many)
            raise DataError(f"{path}: {what}: {first_few(listed)}")
    return chosen


def _listed_names(path: Path) -> list[str]:
    """Return the names in a list: `class/name`, a base name, or an .lst row `id, label, path`."""
    listed = (text.rpartition("\t")[2].strip() for _, text in text_lines(path))
    names = [name for name in listed if name]
    if not names:
        raise DataError(f"{path}: no name in this list")
    return names


def _image_name(name: str) -> str:
    """Return the last two parts of a listed path, `class/name`, or the base name alone."""
    return "/".join(part for part in name.split("/")[-2:] if part != ".")
