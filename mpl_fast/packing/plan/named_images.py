"""Chooses labeled images by a list of names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few


@dataclass
class _Entry:
    """A line of a list, and the images that match the whole line or its first word."""

    text: str
    whole: list[int] = field(default_factory=list)
    word: list[int] = field(default_factory=list)

    @property
    def fits(self) -> list[int]:
        return self.whole or self.word


def choose_named(images: Iterable[tuple[int, str, str]], path: Path) -> set[int]:
    """Return the ids of the images named in a list; memory grows with the list only."""
    entries = [_Entry(name) for name in _listed_names(path)]
    by_whole: dict[str, list[_Entry]] = {}
    by_word: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_whole.setdefault(_image_name(entry.text), []).append(entry)
        by_word.setdefault(_image_name(entry.text.split()[0]), []).append(entry)
    class_of: dict[int, str] = {}
    classes: set[str] = set()
    for record_id, class_name, name in images:
        classes.add(class_name)
        for key in (name, f"{class_name}/{name}"):
            for entry in by_whole.get(key, ()):
                entry.whole.append(record_id)
                class_of[record_id] = class_name
            for entry in by_word.get(key, ()):
                entry.word.append(record_id)
                class_of[record_id] = class_name
    chosen = _one_each(path, entries)
    without = sorted(classes - {class_of[record_id] for record_id in chosen})
    if without:
        raise DataError(
            f"{path}: {len(without)} classes have no labeled image: {first_few(without)}"
        )
    return chosen


def _one_each(path: Path, entries: Sequence[_Entry]) -> set[int]:
    """Return the image of each entry; DataError lists entries that match none or several."""
    unknown = [entry.text for entry in entries if not entry.fits]
    ambiguous = [entry.text for entry in entries if len(entry.fits) > 1]
    chosen: set[int] = set()
    twice = []
    for entry in entries:
        if len(entry.fits) == 1:
            if entry.fits[0] in chosen:
                twice.append(entry.text)
            chosen.add(entry.fits[0])
    for problem, listed in (
        ("fit no image", unknown),
        ("fit images of several classes (write class/name)", ambiguous),
        ("are listed more than once", twice),
    ):
        if listed:
            raise DataError(f"{path}: {len(listed)} names {problem}: {first_few(listed)}")
    return chosen


def _listed_names(path: Path) -> list[str]:
    """Return the names in a list: `class/name`, a base name, or an .lst row `id, label, path`."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    names = [line.rpartition("\t")[2].strip() for line in text.split("\n")]
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{path}: no name in this list")
    return names


def _image_name(name: str) -> str:
    """Return the last two parts of a listed path, `class/name`, or the base name alone."""
    return "/".join(part for part in name.split("/")[-2:] if part != ".")
