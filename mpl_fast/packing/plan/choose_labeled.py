"""Chooses labeled and validation images, by a seed or a list of names, equally on every platform.

Within a class, images are ordered by sha256("seed:class/name") and the first ones are taken: adding
or removing images changes little, and a smaller choice is a subset of a larger one. The seed of
validation images is "val:seed", so that the two choices are independent. SQLite sorts them, on disk
if they are many: memory grows with the number of classes only, or with a list of names.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.plan.named_images import choose_named
from mpl_fast.packing.plan.table import sql_text, to_utf8, with_bytes_kept

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALL = "all"  # a file of this name is written ./all
# No exponent, and a limited number of digits.
_AMOUNT = re.compile(r"[+-]?[0-9./]{1,100}%?")


class Images(NamedTuple):
    """Images of which some are chosen."""

    table: sqlite3.Connection
    rows: str  # SQL: the id, class (a number) and name of each
    classes: Sequence[str]  # names by number

    def query(self, what: str) -> sqlite3.Cursor:
        """Return the rows of a query of these images."""
        return self.table.execute(what.format(f"({self.rows})"))

    def named(self) -> Iterator[tuple[int, str, str]]:
        """Return an iterator of id, class and name."""
        rows = self.query("SELECT id, class, name FROM {}")
        return ((number, self.classes[at], name) for number, at, name in rows)

    def sizes(self) -> dict[str, int]:
        """Return the number of images of each class that has any, sorted by class."""
        found = self.query("SELECT class, count(*) FROM {} GROUP BY class")
        return dict(sorted((self.classes[number], count) for number, count in found))


@contextmanager
def images_in_memory(
    rows: Iterable[tuple[int, int, str]], classes: Sequence[str]
) -> Iterator[Images]:
    """Yield the images with these ids, classes and names."""
    with closing(with_bytes_kept(sqlite3.connect(":memory:"))) as table:
        table.execute("CREATE TABLE images(id INTEGER PRIMARY KEY, class INTEGER, name TEXT)")
        texts = ((number, label, sql_text(name)) for number, label, name in rows)
        table.executemany("INSERT INTO images VALUES (?, ?, CAST(? AS TEXT))", texts)
        yield Images(table, "SELECT * FROM images", classes)


def check_labeled(how: str) -> None:
    """ConfigError unless how is "all", written as a share or a number, or an existing file."""
    if _is_amount(how):
        read_amount("--labeled", how)
    elif how != ALL:
        _list_path(how)


def choose_labeled(images: Images, how: str, *, seed: int, balance: str) -> Iterator[int]:
    """Return an iterator of the ids of the labeled images.

    how is "all", a share ("10%"), a number of images ("4000"), or a file of names. Shares and
    numbers are divided among the classes: evenly with balance "count", as in SimCLR's ImageNet
    subsets, or by class size with "proportional". Raises ConfigError when a class gets no image.
    """
    if how == ALL:
        return (number for (number,) in images.query("SELECT id FROM {}"))
    if is_list(how):
        return iter(choose_named(images.named(), _list_path(how)))
    sizes = images.sizes()
    total = _total("--labeled", how, sum(sizes.values()))
    if balance == "proportional":
        counts = _proportional(sizes, total, seed)
        _require_every_class(counts, how)
    else:
        counts = _even_counts(sizes, how, total, seed)
    return _first(images, counts, seed)


def is_list(how: str) -> bool:
    """Return whether how is meant to be a file of names."""
    return how != ALL and not _is_amount(how)


def choose_val(
    images: Images, how: str, *, seed: int, kept: int = 0, option: str = "--val"
) -> Iterator[int]:
    """Return an iterator of the ids of the images to validate with.

    how is a share ("5%") or a number of all images, to which `kept` belong that cannot be chosen
    and are not among `images`. Each class has its share of the others, rounded up or down, but
    keeps one image. ConfigError, which names the option, if that leaves too few.
    """
    own, sizes = f"val:{seed}", images.sizes()
    count = sum(sizes.values())
    total, most = _total(option, how, count + kept), count - len(sizes)
    if total > most:
        listed = f" besides the {kept} of --labeled" if kept else ""
        raise ConfigError(
            f"{option} {how}: that is {counted(total, 'image')}, but at most {most} can be drawn: "
            f"every class keeps one for training{listed}"
        )
    return _first(images, _proportional(sizes, total, own, keep=1), own)


def mark(table: sqlite3.Connection, update: str, ids: Iterable[int]) -> int:
    """Execute an UPDATE that ends in WHERE and a column, of the rows with these ids; count them."""
    # In the order of the rows: those of a large table are not all in memory.
    table.execute("CREATE TEMP TABLE chosen(id INTEGER PRIMARY KEY)")
    table.executemany("INSERT INTO chosen VALUES (?)", ((number,) for number in ids))
    changed = table.execute(f"{update} IN (SELECT id FROM chosen)").rowcount
    table.execute("DROP TABLE chosen")
    return changed


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


def add_hash_rank(table: sqlite3.Connection, seed: int | str, classes: Sequence[str]) -> None:
    """Define `hash_rank(class, name)` in SQL: the first 128 bits of that of a class by number."""
    starts, sha256 = [to_utf8(f"{seed}:{name}/") for name in classes], hashlib.sha256

    def rank(number: int, name: bytes) -> bytes:
        return sha256(starts[number] + name).digest()[:16]

    table.create_function("hash_rank", 2, rank, deterministic=True)


def _first(images: Images, counts: Mapping[str, int], seed: int | str) -> Iterator[int]:
    """Yield the ids of the first images by rank, so many of each class."""
    add_hash_rank(images.table, seed, images.classes)
    # A name as bytes, since it may be no UTF-8.
    order = "class, hash_rank(class, CAST(name AS BLOB)), id"
    rows = images.query(f"SELECT class, id FROM {{}} ORDER BY {order}")
    for number, own in groupby(rows, itemgetter(0)):
        for _, chosen in islice(own, counts[images.classes[number]]):
            yield chosen


def _proportional(
    sizes: Mapping[str, int], total: int, seed: int | str, keep: int = 0
) -> dict[str, int]:
    """Divide total images among the classes: each gets its share, rounded up or down.

    Image r of a class of n has position (r + u) / n, with u in [0, 1) from the class's name; the
    first positions are taken, so that a smaller total is a subset of a larger one. The last `keep`
    of each class are left.
    """
    import numpy as np  # late: the command line's --help must not wait for it

    count = np.array(list(sizes.values()))
    start = np.array([_rank(seed, name) / (1 << 64) for name in sizes])

    def up_to(position: float) -> "NDArray[np.int64]":
        """Return how many positions of each class are at most this one, as numbers are rounded."""
        last = np.floor(position * count - start).astype(np.int64)  # or one more, or one less
        last += (last + 1 + start) / count <= position
        last -= (last + start) / count > position
        places: NDArray[np.int64] = np.clip(last + 1, 0, count - keep)
        return places

    below, above = -1.0, 1.0  # of them fewer than total are at most, and at least total
    while below < (middle := (below + above) / 2) < above:
        below, above = (below, middle) if up_to(middle).sum() >= total else (middle, above)
    counts = up_to(below)
    equal = np.flatnonzero(up_to(above) > counts)  # the classes with an image at that position
    counts[equal[: total - counts.sum()]] += 1
    return dict(zip(sizes, counts.tolist(), strict=True))


def _require_every_class(counts: Mapping[str, int], how: str) -> None:
    """ConfigError when a class has no chosen image."""
    without = [name for name, count in counts.items() if not count]
    if without:
        what = counted(len(without), "small class gets", "small classes get")
        raise ConfigError(
            f"--labeled {how} --balance proportional: {what} no labeled image: "
            f"{first_few(without)}; choose more, or use --balance count"
        )


def _even_counts(sizes: Mapping[str, int], how: str, total: int, seed: int) -> dict[str, int]:
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
    return counts


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
