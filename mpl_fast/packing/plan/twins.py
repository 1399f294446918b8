"""Unlabeled images that other sources have as well: the same files, found before any is read."""

import sqlite3
from collections.abc import Sequence

from mpl_fast.errors import DataError
from mpl_fast.first_few import counted
from mpl_fast.packing.plan.table import sql_text
from mpl_fast.packing.sources.source import Source


def leave_out_twins(
    table: sqlite3.Connection, number: int, source: Source, earlier: Sequence[Source]
) -> list[str]:
    """Remove images of source `number` from found.images that an earlier source has, too.

    A folder of everything is then the rest beside its labeled part. Equal images in other files
    are packed, and counted at the end. Returns warnings; DataError when no image is left.
    """
    warnings, found = [], 0
    for other, spec in enumerate(one.spec for one in earlier):
        same = same_files(number, source, other, earlier[other])
        if same is None:
            continue
        where, values = same
        removed = table.execute(f"DELETE FROM found.images WHERE {where}", values).rowcount
        found += removed
        if removed and not _left_by_labels(source, earlier[other]):
            what = counted(removed, "of its images is", "of its images are")
            warnings.append(f"{source.spec}: {what} in {spec}, too: packed once, as that one's")
    left = "SELECT 1 FROM found.images WHERE source = ? LIMIT 1"
    if found and not table.execute(left, (number,)).fetchone():
        raise DataError(f"{source.spec}: all its images are other sources': leave it out")
    return warnings


def _left_by_labels(source: Source, earlier: Source) -> bool:
    """Return whether a source is what a labels file left of itself, which was reported."""
    one, two = ((each.place, each.request.folder, each.request.files) for each in (source, earlier))
    return earlier.request.partial and one == two


def same_files(
    number: int, source: Source, other: int, earlier: Source
) -> tuple[str, tuple[object, ...]] | None:
    """Return the condition of those images of a source that another has, too, and its values.

    None: they have no file in common.
    """
    before = _before_paths(source, earlier)
    if before is None:
        return None
    # Images below a folder differ in path, those of one file in position.
    column = "path" if source.file.is_dir() else "start"
    same = f"SELECT CAST(? AS TEXT) || {column} FROM found.images WHERE source = ?"
    where = f"CAST(? AS TEXT) || {column} IN ({same}) AND source = ?"
    return where, (*map(sql_text, before), other, number)


def _before_paths(source: Source, other: Source) -> tuple[str, str] | None:
    """Return what makes paths in the two sources equal where files are, if put before each.

    None: they have no file in common. Links inside a folder are not followed.
    """
    if source.kind != other.kind:
        return None
    one, two = source.place, other.place
    if one.startswith(two):
        return one[len(two) :], ""
    return ("", two[len(one) :]) if two.startswith(one) else None
