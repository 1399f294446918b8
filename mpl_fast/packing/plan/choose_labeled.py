"""Chooses labeled and validation images, by a seed or a list of names, equally on every platform.

Within a class, images are ordered by sha256("seed:class/name") and the first ones are taken: adding
or removing images changes little, and a smaller choice is a subset of a larger one. The seed of
validation images is "val:seed", so that the two choices are independent.
"""

import hashlib
import re
from array import array
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.plan.named_images import choose_named
from mpl_fast.packing.plan.table import blocks

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
        read_amount("--labeled", how)
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
        return listed_images(images, how)
    import numpy as np  # late: the command line's --help must not wait for it

    ids, sizes = _ranked(images, seed)
    total = _total("--labeled", how, len(ids))
    place, counts = _places(sizes), list(sizes.values())
    if balance == "proportional":
        chosen = _proportional(sizes, place, total, seed)
        _require_every_class(sizes, chosen, how)
    else:
        chosen = np.flatnonzero(place < np.repeat(_even_counts(sizes, how, total, seed), counts))
    return set(ids[chosen].tolist())


def listed_images(images: Iterable[tuple[int, str, str]], how: str) -> set[int]:
    """Return the ids of the images that how names if it is a file of names."""
    if how == ALL or _is_amount(how):
        return set()
    return choose_named(images, _list_path(how))


def choose_val(
    images: Iterable[tuple[int, str, str]],
    how: str,
    *,
    seed: int,
    kept: Collection[int] = (),
    option: str = "--val",
) -> set[int]:
    """Return the ids of the images to validate with; images are (id, class, name).

    how is a share ("5%") or a number of all images. Each class has its share of them, rounded up or
    down, but keeps one image, and all whose id is in kept. ConfigError, which names the option, if
    that leaves too few.
    """
    own = f"val:{seed}"
    ids, sizes = _ranked((image for image in images if image[0] not in kept), own)
    total, most = _total(option, how, len(ids) + len(kept)), len(ids) - len(sizes)
    if total > most:
        listed = f" besides the {len(kept)} of --labeled" if kept else ""
        raise ConfigError(
            f"{option} {how}: that is {counted(total, 'image')}, but at most {most} can be drawn: "
            f"every class keeps one for training{listed}"
        )
    return set(ids[_proportional(sizes, _places(sizes), total, own, keep=1)].tolist())


def read_amount(option: str, how: str) -> Fraction:
    """Return the number in "10%" or "4000"; ConfigError if there is none."""
    try:
        if not _AMOUNT.fullmatch(how):
            raise ValueError(how)
        return Fraction(how.removesuffix("%"))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{option} {how}: not a share such as 10%") from error


def hash_rank(seed: int | str, key: str) -> bytes:
    """Return sha256("seed:key"), which gives keys a pseudo-random order."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


def _rank(seed: int | str, key: str) -> int:
    """Return the first 64 bits of the hash."""
    return int.from_bytes(hash_rank(seed, key)[:8], "big")


def _ranked(
    images: Iterable[tuple[int, str, str]], seed: int | str
) -> "tuple[Ints, dict[str, int]]":
    """Return ids ordered by class and, within it, by rank; and the size of each class in order.

    Uses 20 bytes an image, and as much again for sorting.
    """
    import numpy as np

    numbers: dict[str, int] = {}
    ids, classes, ranks = array("q"), array("i"), array("Q")
    for block in blocks(images):
        new_ids, class_names, texts = zip(*block, strict=True)
        ids.extend(new_ids)
        classes.extend([numbers.setdefault(name, len(numbers)) for name in class_names])
        digests = b"".join(map(hash_rank, repeat(seed), map("{}/{}".format, class_names, texts)))
        ranks.frombytes(np.frombuffer(digests, ">u8")[::4].astype(np.uint64).tobytes())
    names = sorted(numbers)
    position = np.empty(len(names), np.int64)
    position[[numbers[name] for name in names]] = np.arange(len(names))
    label = position[np.frombuffer(classes, np.int32)]
    order = np.lexsort((np.frombuffer(ranks, np.uint64), label))
    counts = np.bincount(label, minlength=len(names)).tolist()
    return np.frombuffer(ids, np.int64)[order], dict(zip(names, counts, strict=True))


def _places(sizes: Mapping[str, int]) -> "Ints":
    """Return the place of each image within its class, from 0."""
    import numpy as np

    counts = np.array(list(sizes.values()))
    places: Ints = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _proportional(
    sizes: Mapping[str, int], place: "Ints", total: int, seed: int | str, keep: int = 0
) -> "Ints":
    """Choose total images so that each class gets its share of them, rounded up or down.

    Image r of a class of n has position (r + u) / n, with u in [0, 1) from the class's name; the
    first positions are taken, so that a smaller total is a subset of a larger one. The last `keep`
    of each class are left.
    """
    import numpy as np

    counts, label = np.array(list(sizes.values())), _label(sizes)
    start = np.array([_rank(seed, name) / (1 << 64) for name in sizes])
    position = (place + start[label]) / counts[label]
    position[place + keep >= counts[label]] = np.inf
    return np.argsort(position, kind="stable")[:total]


def _label(sizes: Mapping[str, int]) -> "Ints":
    """Return the class of each image, by number."""
    import numpy as np

    return np.repeat(np.arange(len(sizes)), list(sizes.values()))


def _require_every_class(sizes: Mapping[str, int], chosen: "Ints", how: str) -> None:
    """ConfigError when a class has no chosen image."""
    names, with_one = list(sizes), set(_label(sizes)[chosen].tolist())
    without = [names[at] for at in range(len(names)) if at not in with_one]
    if without:
        what = counted(len(without), "small class gets", "small classes get")
        raise ConfigError(
            f"--labeled {how} --balance proportional: {what} no labeled image: "
            f"{first_few(without)}; choose more, or use --balance count"
        )


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


def _total(option: str, how: str, images: int) -> int:
    """Return the number of images that a share or number means."""
    amount = read_amount(option, how)
    total = round(amount / 100 * images) if how.endswith("%") else int(amount)
    if not 0 < total <= images:
        what = counted(total, "labeled image" if option == "--labeled" else "image")
        raise ConfigError(f"{option} {how}: that is {what}, the source has {images}")
    return total
