"""Labels files: the classes of images outside class folders."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import Tally, counted
from mpl_fast.packing.sources.lists import text_lines
from mpl_fast.packing.sources.source import Image

_DEVKIT_CLASSES = 1000


def labeled_images(images: Iterable[Image], path: Path, spec: str) -> Iterator[Image]:
    """Yield images with their classes from a labels file, which is held in memory.

    Its lines are `name class` (separated by tab, comma or space), or a class each, for the images
    in the order of their names. Raises DataError when an image has no line, several images one
    line, or a line no image; spec names the images in it.
    """
    by_name, in_order = _read(path)
    spare = []
    if in_order:
        images = sorted(images, key=lambda image: image.name)
        names = dict.fromkeys(image.name for image in images)
        by_name = {name: (label, 0) for name, label in zip(names, in_order, strict=False)}
        spare = [f"class {number + 1} (no image)" for number in range(len(names), len(in_order))]
    yield from matched_images(images, by_name, str(path), spec, spare)


def matched_images(
    images: Iterable[Image],
    by_name: Mapping[str, tuple[str, int]],
    path: str,
    spec: str,
    spare: Iterable[str] = (),
) -> Iterator[Image]:
    """Yield images with the class that by_name, with the number of its line in path, gives each.

    Raises DataError for spare lines and for those that do not fit the images one to one.
    """
    faults = Tally()
    for line in spare:
        faults.add(line)
    seen: Counter[str] = Counter()
    for image in images:
        seen[image.name] += 1
        if image.name in by_name:
            yield image._replace(class_name=by_name[image.name][0])
    for name, count in seen.items():
        if name not in by_name:
            faults.add(f"{name} (no line)")
        elif count > 1:
            faults.add(f"{name} ({count} images)")
    for name, (_, number) in by_name.items():
        if name not in seen:
            faults.add(f"{name} (line {number}, no image)")
    if faults.count:
        what = counted(faults.count, "name does not fit", "names do not fit")
        raise DataError(f"{path}: {what} the images of {spec}: {faults}")


def _read(path: Path) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """Return class and line number by name, and the classes of lines without a name."""
    by_name: dict[str, tuple[str, int]] = {}
    in_order: list[str] = []
    for number, text in text_lines(path):
        where = f"{path}: line {number}"
        name, label = _name_and_class(text)
        if not label or (in_order if name else by_name):
            raise DataError(f"{where}: {text!r}: each line must be `name class`, or each a class")
        if "/" in label:
            raise DataError(f"{where}: a class with a slash in it: {label!r}")
        if name in by_name:
            raise DataError(f"{where}: {name} is on line {by_name[name][1]} already")
        if name:
            by_name[name] = label, number
        else:
            in_order.append(label)
    if not by_name and not in_order:
        raise DataError(f"{path}: gives no class")
    if in_order and all(_is_devkit_id(label) for label in in_order):
        raise DataError(
            f"{path}: these look like the ILSVRC devkit's numbers, which do not follow the "
            "order of the class names: give a WordNet id, as n01440764, on each line"
        )
    return by_name, in_order


def _name_and_class(text: str) -> tuple[str, str]:
    """Return the name without folders ("" if the line has a class only) and the class."""
    between = next((character for character in "\t," if character in text), None)
    name, _, label = text.rpartition(between) if between else text.strip().rpartition(" ")
    return name.strip().rpartition("/")[2], label.strip()


def _is_devkit_id(label: str) -> bool:
    return label.isdecimal() and 0 < int(label) <= _DEVKIT_CLASSES
