"""Images with the class and name of another: they get longer names, made of their paths."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted
from mpl_fast.packing.plan.choose_labeled import hash_rank
from mpl_fast.packing.plan.table import sql_text
from mpl_fast.packing.plan.twins import same_files
from mpl_fast.packing.sources.source import Source, require_one_line

_EQUAL = "SELECT class, name FROM found.images WHERE part = ? GROUP BY 1, 2 HAVING count(*) > 1"
_ATTEMPTS = 3


def make_names_unique(
    table: sqlite3.Connection,
    part: int,
    sources: Mapping[int, Source],
    classes: Sequence[str],
) -> list[str]:
    """Rename those images of a part in found.images whose class and name another has, too.

    sources and classes are by number. Returns a warning; DataError when one file is there twice.
    """
    _require_own_files(table, sources)
    if not _any_equal(table, part):
        return []
    require_files_once(table, part, sources)
    table.execute("DROP TABLE IF EXISTS found.renamed")
    table.execute("CREATE TABLE found.renamed(id INTEGER PRIMARY KEY, name TEXT)")
    for attempt in range(_ATTEMPTS):
        table.executemany(
            "INSERT OR REPLACE INTO found.renamed VALUES (?, CAST(? AS TEXT))",
            _renamed(table, part, sources, attempt),
        )
        table.execute(
            "UPDATE found.images SET name = "
            "(SELECT renamed.name FROM found.renamed WHERE id = images.rowid) "
            "WHERE rowid IN (SELECT id FROM found.renamed)"
        )
        if not _any_equal(table, part):
            break
    (count,) = table.execute("SELECT count(*) FROM found.renamed").fetchone()
    number, path, named, name = table.execute(
        "SELECT source, path, class, images.name FROM found.images JOIN found.renamed "
        "ON images.rowid = id ORDER BY source, path LIMIT 1"
    ).fetchone()
    specs = " + ".join(source.spec for source in sources.values())
    return [
        f"{specs}: {count} images have the class and name of others: named by their paths, as "
        f"{classes[named]}/{name} ({path} in {sources[number].spec}); if these are several splits, "
        "name one folder"
    ]


def require_files_once(table: sqlite3.Connection, part: int, sources: Mapping[int, Source]) -> None:
    """DataError when a source has one path twice in a class."""
    query = (
        "SELECT source, path FROM found.images WHERE part = ? "
        "GROUP BY source, class, name, path HAVING count(*) > 1"
    )
    twice, hints = Tally(), {}
    for number, path in table.execute(query, (part,)):
        twice.add(path)
        hints[sources[number].spec] = sources[number].same_names
    if hints:
        what = counted(twice.count, "name occurs", "names occur")
        raise DataError(
            f"{' + '.join(hints)}: {what} more than once in one source: {twice}; "
            f"{next(iter(hints.values()))}"
        )


def _require_own_files(table: sqlite3.Connection, sources: Mapping[int, Source]) -> None:
    """DataError when two sources have a file in common."""
    for (other, earlier), (number, source) in combinations(sources.items(), 2):
        if same := same_files(number, source, other, earlier):
            where, values = same
            query = f"SELECT count(*) FROM found.images WHERE {where}"
            (count,) = table.execute(query, values).fetchone()
            if count:
                what = counted(count, "of its images is", "of its images are")
                raise DataError(
                    f"{source.spec}: {what} in {earlier.spec}, too: give each image once"
                )


def _any_equal(table: sqlite3.Connection, part: int) -> bool:
    return table.execute(f"{_EQUAL} LIMIT 1", (part,)).fetchone() is not None


def _renamed(
    table: sqlite3.Connection,
    part: int,
    sources: Mapping[int, Source],
    attempt: int,
) -> Iterator[tuple[int, str | bytes]]:
    """Yield row and new name of each image whose class and name another has, too."""
    tags = _tags(sources)
    query = (
        "SELECT images.rowid, source, path FROM found.images "
        f"JOIN ({_EQUAL}) USING (class, name) WHERE part = ?"
    )
    for row, number, path in table.execute(query, (part, part)):
        name = path.replace("/", "_")
        if attempt > 0:
            name = f"{tags[number]}_{name}"
        if attempt > 1:  # as for a/b_c and a_b/c
            name = f"{hash_rank(tags[number], path).hex()[:16]}_{name}"
        require_one_line(name, path, sources[number].spec)
        yield row, sql_text(name)


def _tags(sources: Mapping[int, Source]) -> dict[int, str]:
    """Return a name for each source: the last part of its path, or its number."""
    tags = {number: Path(source.spec).name for number, source in sources.items()}
    if len(set(tags.values())) == len(tags):
        return tags
    return {number: str(number) for number in sources}
