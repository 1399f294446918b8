"""Which images are labeled: the same draw on every platform, from a seed or from a list of names.

Within a class, images are ranked by sha256("seed:class/name") and the first ones are taken: other
images that come or go change little, and a smaller draw of a seed is part of its larger draws.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import first_few

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# No exponent, and no more digits than can be reckoned with at once.
_AMOUNT = re.compile(r"[+-]?[0-9./]{1,100}%?")
_RANKS = 1 << 64


def choose(
    images: Iterable[tuple[int, str, str]], how: str, *, seed: int, balance: str = "count"
) -> set[int]:
    """Return the ids of the labeled ones among images, which are (id, class, name).

    how is a share ("10%"), a number of images ("4000"), or a file of names. Shares and numbers are
    spread over the classes: evenly with balance "count", as in SimCLR's ImageNet subsets, or by
    the classes' sizes with "proportional". Every class gets at least one image, else ConfigError.
    """
    if not (how.endswith("%") or how.isdecimal()):
        return _named(images, _list_path(how))
    amount = _parse_amount(how)
    ranking = _Ranking.of(images, seed)
    total = _total(how, amount, len(ranking.ids))
    if balance == "proportional":
        chosen = ranking.proportional(total, how)
    else:
        chosen = ranking.first(_even_counts(ranking.sizes, how, total, seed))
    return set(ranking.ids[chosen].tolist())


def rank(seed: int | str, key: str) -> bytes:
    """Return sha256("seed:key"), by which keys are put in an order that looks random."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class _Ranking:
    """Images ordered by class and, within it, by rank: 24 bytes each, so that many fit."""

    seed: int
    sizes: Mapping[str, int]  # images of each class, classes in order of their names
    ids: "NDArray[np.int64]"

    @staticmethod
    def of(images: Iterable[tuple[int, str, str]], seed: int) -> "_Ranking":
        import numpy as np  # late: the command line's --help must not wait for it

        numbers: dict[str, int] = {}
        ids, classes, ranks = array("q"), array("i"), array("Q")
        for record_id, class_name, name in images:
            ids.append(record_id)
            classes.append(numbers.setdefault(class_name, len(numbers)))
            ranks.append(int.from_bytes(rank(seed, f"{class_name}/{name}")[:8], "big"))
        names = sorted(numbers)
        position = np.empty(len(names), np.int64)
        position[[numbers[name] for name in names]] = np.arange(len(names))
        label = position[np.frombuffer(classes, np.int32)]
        order = np.lexsort((np.frombuffer(ranks, np.uint64), label))
        counts = np.bincount(label, minlength=len(names)).tolist()
        sizes = dict(zip(names, counts, strict=True))
        return _Ranking(seed, sizes, np.frombuffer(ids, np.int64)[order])

    def first(self, counts: Mapping[str, int]) -> "NDArray[np.bool_]":
        """Choose the first counts[class] images of each class."""
        import numpy as np

        taken = np.repeat([counts[name] for name in self.sizes], list(self.sizes.values()))
        return np.asarray(self._place() < taken, np.bool_)

    def proportional(self, total: int, how: str) -> "NDArray[np.bool_]":
        """Choose total images so that each class gets its share of them, rounded up or down.

        Image r of a class of n comes at (r + u) / n, u between 0 and 1 from the class's name: the
        classes run through their images in step, and a smaller total is the beginning of a larger.
        """
        import numpy as np

        sizes = np.array(list(self.sizes.values()))
        draws = [int.from_bytes(rank(self.seed, name)[:8], "big") / _RANKS for name in self.sizes]
        time = (self._place() + np.repeat(draws, sizes)) / np.repeat(sizes, sizes)
        chosen = np.zeros(len(self.ids), np.bool_)
        chosen[np.argsort(time, kind="stable")[:total]] = True
        counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[chosen], minlength=len(sizes))
        without = np.flatnonzero(counts == 0)
        if len(without):
            names = list(self.sizes)
            raise ConfigError(
                f"--labeled {how} --balance proportional: {len(without)} small classes get no "
                f"labeled image: {first_few(names[at] for at in without)}; ask for more, or use "
                "--balance count"
            )
        return chosen

    def _place(self) -> "NDArray[np.int64]":
        """Return each image's place in its class's order, from 0."""
        import numpy as np

        sizes = np.array(list(self.sizes.values()))
        starts = np.cumsum(sizes) - sizes
        return np.asarray(np.arange(len(self.ids)) - np.repeat(starts, sizes), np.int64)


def _list_path(how: str) -> Path:
    path = Path(how)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"--labeled {how}: {error.strerror}") from error
    raise ConfigError(f"--labeled {how}: give a share (10%), a number (4000), or an existing file")


def _parse_amount(how: str) -> Fraction:
    """Return a share of 1 for a percentage, else a number of images."""
    try:
        if not _AMOUNT.fullmatch(how):
            raise ValueError(how)
        return Fraction(how[:-1]) / 100 if how.endswith("%") else Fraction(int(how))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--labeled {how}: not a share such as 10%") from error


def _total(how: str, amount: Fraction, images: int) -> int:
    total = round(amount * images) if how.endswith("%") else int(amount)
    if not 0 < total <= images:
        raise ConfigError(
            f"--labeled {how}: that is {total} labeled images, the source has {images}"
        )
    return total


def _even_counts(sizes: Mapping[str, int], how: str, total: int, seed: int) -> dict[str, int]:
    """Return how many labeled images each class gets; the seed says who gets one of the rest."""
    each, rest = divmod(total, len(sizes))
    if each == 0:
        raise ConfigError(
            f"--labeled {how}: {total} labeled images for {len(sizes)} classes leave "
            f"{len(sizes) - rest} classes without any; ask for at least {len(sizes)}"
        )
    with_one_more = set(sorted(sizes, key=lambda name: rank(seed, name))[:rest])
    counts = {name: each + (name in with_one_more) for name in sizes}
    few = [name for name in sizes if sizes[name] < counts[name]]
    short = [f"{name} ({sizes[name]} of {counts[name]})" for name in few]
    if short:
        raise DataError(
            f"--labeled {how}: {len(short)} classes have fewer images than their even share: "
            f"{first_few(short)}; ask for fewer, use --balance proportional, or name the images "
            "in a file"
        )
    return counts


@dataclass
class _Entry:
    """A line of a list, and the images that it fits: by the whole line, or by its first word."""

    text: str
    whole: list[int] = field(default_factory=list)
    word: list[int] = field(default_factory=list)

    @property
    def fits(self) -> list[int]:
        return self.whole or self.word


def _named(images: Iterable[tuple[int, str, str]], path: Path) -> set[int]:
    """Return the ids of the images named in a list; only the list is held in memory."""
    entries = [_Entry(name) for name in _listed_names(path)]
    by_whole: dict[str, list[_Entry]] = {}
    by_word: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_whole.setdefault(_wanted(entry.text), []).append(entry)
        by_word.setdefault(_wanted(entry.text.split()[0]), []).append(entry)
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
    """Return the one image of each entry; DataError lists the entries that fit none or several."""
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
        ("stand there more than once", twice),
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


def _wanted(name: str) -> str:
    """Return the `class/name`, or the base name, that a listed path asks for."""
    return "/".join(part for part in name.split("/")[-2:] if part != ".")
