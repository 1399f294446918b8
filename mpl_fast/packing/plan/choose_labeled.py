"""Chooses the labeled images, by a seed or a list of names, equally on every platform.

Within a class, images are ordered by sha256("seed:class/name") and the first ones are taken: adding
or removing images changes little, and a smaller choice is a subset of a larger one.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import counted, first_few
from mpl_fast.packing.plan.named_images import choose_named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

ALL = "all"  # a file of this name is written ./all
# No exponent, and a limited number of digits.
_AMOUNT = re.compile(r"[+-]?[0-9./]{1,100}%?")


def check_labeled(how: str) -> None:
    """ConfigError unless how is "all", written as a share or a number, or an existing file."""
    if _is_amount(how):
        _amount(how)
    elif how != ALL:
        _list_path(how)


def choose_labeled(
    images: Iterable[tuple[int, str, str]], how: str, *, seed: int, balance: str = "count"
) -> set[int]:
    """Return the ids of the labeled images; images are (id, class, name).

    how is "all", a share ("10%"), a number of images ("4000"), or a file of names. Shares and
    numbers are divided among the classes: evenly with balance "count", as in SimCLR's ImageNet
    subsets, or by class size with "proportional". Raises ConfigError when a class gets no image.
    """
    if how == ALL:
        return {record_id for record_id, _, _ in images}
    if not _is_amount(how):
        return choose_named(images, _list_path(how))
    import numpy as np  # late: the command line's --help must not wait for it

    ids, sizes = _ranked(images, seed)
    total = _total(how, len(ids))
    counts = np.array(list(sizes.values()))
    # Of each image within its class, from 0.
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    if balance == "proportional":
        chosen = _proportional(sizes, place, how, total, seed)
    else:
        chosen = np.flatnonzero(place < np.repeat(_even_counts(sizes, how, total, seed), counts))
    return set(ids[chosen].tolist())


def hash_rank(seed: int | str, key: str) -> bytes:
    """Return sha256("seed:key"), which gives keys a pseudo-random order."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


def _rank(seed: int, key: str) -> int:
    """Return the first 64 bits of the hash."""
    return int.from_bytes(hash_rank(seed, key)[:8], "big")


def _ranked(images: Iterable[tuple[int, str, str]], seed: int) -> "tuple[Ints, dict[str, int]]":
    """Return ids ordered by class and, within it, by rank; and the size of each class in order.

    Uses 20 bytes an image, and as much again for sorting.
    """
    import numpy as np

    numbers: dict[str, int] = {}
    ids, classes, ranks = array("q"), array("i"), array("Q")
    for record_id, class_name, name in images:
        ids.append(record_id)
        classes.append(numbers.setdefault(class_name, len(numbers)))
        ranks.append(_rank(seed, f"{class_name}/{name}"))
    names = sorted(numbers)
    position = np.empty(len(names), np.int64)
    position[[numbers[name] for name in names]] = np.arange(len(names))
    label = position[np.frombuffer(classes, np.int32)]
    order = np.lexsort((np.frombuffer(ranks, np.uint64), label))
    counts = np.bincount(label, minlength=len(names)).tolist()
    return np.frombuffer(ids, np.int64)[order], dict(zip(names, counts, strict=True))


def _proportional(
    sizes: Mapping[str, int], place: "Ints", how: str, total: int, seed: int
) -> "Ints":
    """Choose total images so that each class gets its share of them, rounded up or down.

    Image r of a class of n has position (r + u) / n, with u in [0, 1) from the class's name; the
    first positions are taken, so that a smaller total is a subset of a larger one.
    """
    import numpy as np

    label = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    start = np.array([_rank(seed, name) / (1 << 64) for name in sizes])
    position = (place + start[label]) / np.array(list(sizes.values()))[label]
    chosen = np.argsort(position, kind="stable")[:total]
    names = list(sizes)
    without = [names[at] for at in np.setdiff1d(np.arange(len(sizes)), label[chosen])]
    if without:
        what = counted(len(without), "small class gets", "small classes get")
        raise ConfigError(
            f"--labeled {how} --balance proportional: {what} no labeled image: "
            f"{first_few(without)}; choose more, or use --balance count"
        )
    return chosen


def _even_counts(sizes: Mapping[str, int], how: str, total: int, seed: int) -> list[int]:
    """Return the number of labeled images of each class; the seed distributes the remainder."""
    each, rest = divmod(total, len(sizes))
    if each == 0:
        images = counted(total, "labeled image")
        without = counted(len(sizes) - rest, "class has", "classes have")
        raise ConfigError(
            f"--labeled {how}: {images} for {len(sizes)} classes, so that {without} none; choose "
            f"at least {len(sizes)}"
        )
    with_one_more = set(sorted(sizes, key=lambda name: hash_rank(seed, name))[:rest])
    counts = {name: each + (name in with_one_more) for name in sizes}
    short = [
        f"{name} ({sizes[name]} of {counts[name]})" for name in sizes if sizes[name] < counts[name]
    ]
    if short:
        what = counted(len(short), "class has", "classes have")
        raise DataError(
            f"--labeled {how}: {what} fewer images than the even share: {first_few(short)}; choose "
            "fewer, use --balance proportional, or name the images in a file"
        )
    return list(counts.values())


def _is_amount(how: str) -> bool:
    return how.endswith("%") or how.isdecimal()


def _list_path(how: str) -> Path:
    path = Path(how)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"--labeled {how}: {error.strerror}") from error
    raise ConfigError(
        f"--labeled {how}: give a share (10%), a number (4000), all, or an existing file"
    )


def _amount(how: str) -> Fraction:
    try:
        if not _AMOUNT.fullmatch(how):
            raise ValueError(how)
        return Fraction(how.removesuffix("%"))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--labeled {how}: not a share such as 10%") from error


def _total(how: str, images: int) -> int:
    """Return the number of images that a share or number means."""
    amount = _amount(how)
    total = round(amount / 100 * images) if how.endswith("%") else int(amount)
    if not 0 < total <= images:
        what = counted(total, "labeled image")
        raise ConfigError(f"--labeled {how}: that is {what}, the source has {images}")
    return total
