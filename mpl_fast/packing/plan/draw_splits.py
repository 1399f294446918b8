"""Draws the validation images of a `--val 5%`, then the labeled ones, among the images found."""

import sqlite3
from collections.abc import Iterator, Sequence

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.options import PackOptions, is_drawn
from mpl_fast.packing.plan.choose_labeled import choose_labeled, choose_val, listed_images
from mpl_fast.packing.plan.layout import TRAIN, VAL


def draw_splits(
    table: sqlite3.Connection, classes: Sequence[str], options: PackOptions
) -> list[str]:
    """Set `part` and `labeled` of the drawn rows of found.images; classes are named by number.

    Returns warnings. Raises DataError where no image is left, ConfigError where the images cannot
    be drawn.
    """
    if not _any(table, f"part = {TRAIN}"):
        raise DataError("--src: none of its images has a label")
    warnings = []
    if options.val is not None and is_drawn(options.val):
        warnings = _draw_val(table, classes, options, options.val)
    how = options.split
    images = _training_images(table, classes)
    chosen = choose_labeled(images, how.labeled, seed=how.split_seed, balance=how.balance)
    table.executemany(
        "UPDATE found.images SET labeled = 1 WHERE rowid = ?", ((row,) for row in chosen)
    )
    if how.unlabeled == "rest" and not _any(table, f"part != {VAL} AND NOT labeled"):
        raise DataError("--unlabeled rest: no image is left, all are labeled; use --unlabeled all")
    return warnings


def _draw_val(
    table: sqlite3.Connection, classes: Sequence[str], options: PackOptions, how: str
) -> list[str]:
    """Make validation images of training images, but not of those that a list names as labeled."""
    listed = listed_images(_training_images(table, classes), options.split.labeled)
    images, seed = _training_images(table, classes), options.val_seed or 0
    chosen = choose_val(images, how, seed=seed, kept=listed)
    table.executemany(
        f"UPDATE found.images SET part = {VAL} WHERE rowid = ?", ((row,) for row in chosen)
    )
    query = (
        f"SELECT class FROM found.images WHERE part IN ({TRAIN}, {VAL}) "
        f"GROUP BY class HAVING max(part) = {TRAIN}"
    )
    absent = sorted(classes[number] for (number,) in table.execute(query))
    what = counted(len(absent), "class", "classes")
    return [f"--val {how}: has no image of {what}: {first_few(absent)}"] if absent else []


def _training_images(
    table: sqlite3.Connection, classes: Sequence[str]
) -> Iterator[tuple[int, str, str]]:
    """Return an iterator of row, class and name of each image that may be drawn."""
    query = f"SELECT rowid, class, name FROM found.images WHERE part = {TRAIN}"
    return ((row, classes[number], name) for row, number, name in table.execute(query))


def _any(table: sqlite3.Connection, where: str) -> bool:
    """Return whether an image fulfills a condition."""
    query = f"SELECT 1 FROM found.images WHERE {where} LIMIT 1"
    return table.execute(query).fetchone() is not None
