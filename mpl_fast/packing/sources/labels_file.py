"""Labels files: the classes of images outside class folders."""

from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import Tally
from mpl_fast.packing.sources.lists import text_lines

_DEVKIT_CLASSES = 1000


class Labels:
    """Classes of images outside class folders, from a labels file that is held in memory.

    Its lines are `name class` (separated by tab, comma or space), or a class each, for the images
    in the order of their names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_order: list[str] = []
        self._by_name: dict[str, tuple[str, int]] = {}  # class and line
        self._taken: dict[str, None] = {}
        self._faults = Tally()
        for number, text in text_lines(path):
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
        """Whether lines have no names: then `take` must be called in the order of names."""
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
        """Return the class of an image; None if it has none, which require_all_taken reports."""
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
        """DataError when an image has no line, several images one line, or a line no image."""
        for name, (_, number) in self._by_name.items():
            if name not in self._taken:
                self._faults.add(f"{name} (line {number}, no image)")
        for number in range(len(self._taken), len(self._in_order)):
            self._faults.add(f"class {number + 1} (no image)")
        if self._faults.count:
            fault = f"{self._faults.count} names do not fit the images of {spec}"
            raise DataError(f"{self._path}: {fault}: {self._faults}")


def _name_and_class(text: str) -> tuple[str, str]:
    """Return the name without folders ("" if the line has a class only) and the class."""
    between = next((character for character in "\t," if character in text), None)
    name, _, class_name = text.rpartition(between) if between else text.strip().rpartition(" ")
    return name.strip().rpartition("/")[2], class_name.strip()


def _are_devkit_ids(classes: list[str]) -> bool:
    numbers = all(name.isdecimal() and 0 < int(name) <= _DEVKIT_CLASSES for name in classes)
    return bool(classes) and numbers
