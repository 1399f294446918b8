"""Draws the validation images of a `--val 5%`, then the labeled ones, among the images found."""

import sqlite3
from collections.abc import Sequence

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.options import PackOptions, is_drawn
from mpl_fast.packing.plan.choose_labeled import (
    Images,
    choose_labeled,
    choose_val,
    is_list,
    mark,
)
from mpl_fast.packing.plan.layout import TRAIN, VAL

# A class may have several numbers: its name and its label, in two sources.
_TRAIN = (
    "SELECT images.rowid AS id, label AS class, images.name FROM found.images "
    f"JOIN found.classes USING (class) WHERE part = {TRAIN} AND NOT labeled"
)


def draw_splits(
    table: sqlite3.Connection, classes: Sequence[str], options: PackOptions
) -> list[str]:
    """Set `part` and `labeled` of the drawn rows of found.images; classes are named by label.

    Validation images are not those that a list names as labeled. Returns warnings. Raises DataError
    where no image is left, ConfigError where the images cannot be drawn.
    """
    if not _any(table, f"part = {TRAIN}"):
        raise DataError("--src: none of its images has a label")
    how, images, warnings = options.split, Images(table, _TRAIN, classes), []

    def choose() -> int:
        """Mark the labeled images; return their number."""
        chosen = choose_labeled(images, how.labeled, seed=how.split_seed, balance=how.balance)
        return mark(table, "UPDATE found.images SET labeled = 1 WHERE rowid", chosen)

    listed = choose() if is_list(how.labeled) else 0
    if options.val is not None and is_drawn(options.val):
        warnings = _draw_val(images, listed, options.val, options.val_seed or 0)
    if not listed:
        choose()
    if how.unlabeled == "rest" and not _any(table, f"part != {VAL} AND NOT labeled"):
        raise DataError("--unlabeled rest: no image is left, all are labeled; use --unlabeled all")
    return warnings


def _draw_val(images: Images, listed: int, how: str, seed: int) -> list[str]:
    """Make validation images of training images; of those, so many are in a list already."""
    chosen = choose_val(images, how, seed=seed, kept=listed)
    mark(images.table, f"UPDATE found.images SET part = {VAL} WHERE rowid", chosen)
    query = (
        f"SELECT label FROM found.images JOIN found.classes USING (class) "
        f"WHERE part IN ({TRAIN}, {VAL}) GROUP BY label HAVING max(part) = {TRAIN}"
    )
    absent = sorted(images.classes[label] for (label,) in images.table.execute(query))
    what = counted(len(absent), "class", "classes")
    return [f"--val {how}: has no image of {what}: {first_few(absent)}"] if absent else []


def _any(table: sqlite3.Connection, where: str) -> bool:
    """Return whether an image fulfills a condition."""
    query = f"SELECT 1 FROM found.images WHERE {where} LIMIT 1"
    return table.execute(query).fetchone() is not None
