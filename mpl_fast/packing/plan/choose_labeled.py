"""Chooses the labeled images, by a seed or a list of names, equally on every platform.

Within a class, images are ordered by sha256("seed:class/name") and the first ones are taken: adding
or removing images changes little, and a smaller choice is a subset of a larger one.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.plan.named_images import choose_named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# No exponent, and a limited number of digits.
_AMOUNT = re.compile(r"[+-]?[0-9./]{1,100}%?")
_RANKS = 1 << 64


def choose_labeled(
    images: Iterable[tuple[int, str, str]], how: str, *, seed: int, balance: str = "count"
) -> set[int]:
    """Return the ids of the labeled images; images are (id, class, name).

    how is a share ("10%"), a number of images ("4000"), or a file of names. Shares and numbers are
    divided among the classes: evenly with balance "count", as in SimCLR's ImageNet subsets, or by
    class size with "proportional". Raises ConfigError when a class gets no image.
    """
    if not (how.endswith("%") or how.isdecimal()):
        return choose_named(images, _list_path(how))
    amount = _parse_amount(how)
    ranking = _Ranking.of(images, seed)
    total = _total(how, amount, len(ranking.ids))
    if balance == "proportional":
        chosen = ranking.proportional(total, how)
    else:
        chosen = ranking.first(_even_counts(ranking.sizes, how, total, seed))
    return set(ranking.ids[chosen].tolist())


def hash_rank(seed: int | str, key: str) -> bytes:
    """Return sha256("seed:key"), which gives keys a pseudo-random order."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class _Ranking:
    """Images ordered by class and, within it, by rank; 24 bytes each."""

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
            ranks.append(int.from_bytes(hash_rank(seed, f"{class_name}/{name}")[:8], "big"))
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

        Image r of a class of n has position (r + u) / n, with u in [0, 1) from the class's name;
        the first positions are taken, so that a smaller total is a subset of a larger one.
        """
        import numpy as np

        sizes = np.array(list(self.sizes.values()))
        draws = [
            int.from_bytes(hash_rank(self.seed, name)[:8], "big") / _RANKS for name in self.sizes
        ]
        time = (self._place() + np.repeat(draws, sizes)) / np.repeat(sizes, sizes)
        chosen = np.zeros(len(self.ids), np.bool_)
        chosen[np.argsort(time, kind="stable")[:total]] = True
        counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[chosen], minlength=len(sizes))
        without = np.flatnonzero(counts == 0)
        if len(without):
            names = list(self.sizes)
            raise ConfigError(
                f"--labeled {how} --balance proportional: {len(without)} small classes get no "
                f"labeled image: {first_few(names[at] for at in without)}; choose more, or use "
                "--balance count"
            )
        return chosen

    def _place(self) -> "NDArray[np.int64]":
        """Return each image's position within its class, from 0."""
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
    """Return the number of labeled images of each class; the seed distributes the remainder."""
    each, rest = divmod(total, len(sizes))
    if each == 0:
        raise ConfigError(
            f"--labeled {how}: {total} labeled images for {len(sizes)} classes leave "
            f"{len(sizes) - rest} classes without any; choose at least {len(sizes)}"
        )
    with_one_more = set(sorted(sizes, key=lambda name: hash_rank(seed, name))[:rest])
    counts = {name: each + (name in with_one_more) for name in sizes}
    few = [name for name in sizes if sizes[name] < counts[name]]
    short = [f"{name} ({sizes[name]} of {counts[name]})" for name in few]
    if short:
        raise DataError(
            f"--labeled {how}: {len(short)} classes have fewer images than their even share: "
            f"{first_few(short)}; choose fewer, use --balance proportional, or name the images "
            "in a file"
        )
    return counts
