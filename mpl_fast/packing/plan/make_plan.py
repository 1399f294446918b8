"""Makes the plan of a pack: labels, labeled images, order, ids and shards, before an image is read.

The plan is the table (table.py). Everything that grows with the dataset is in SQLite files beside
it, so that the number of images is limited by the disk, not by memory.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mpl_fast.data.records import ID_LIMIT
from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.choose_labeled import choose_labeled, hash_rank
from mpl_fast.packing.plan.layout import TRAIN, VAL, ShardGroup, shard_groups
from mpl_fast.packing.plan.sharding import ShardAssigner, ShardDigest, shard_file
from mpl_fast.packing.plan.table import RecordRow, create_table, table_errors, to_utf8
from mpl_fast.packing.sources.source import Source

RECORD_BYTES = 96  # of a record besides its image, in all files of a pack but the table; about
TABLE_BYTES = 130  # of a record in the finished table; about
_FOUND = """
CREATE TABLE found.images(part INTEGER NOT NULL, source INTEGER NOT NULL, class INTEGER NOT NULL,
                          name TEXT NOT NULL, path TEXT NOT NULL, start INTEGER NOT NULL,
                          size INTEGER NOT NULL, stamp INTEGER NOT NULL, rank BLOB NOT NULL,
                          labeled INTEGER NOT NULL DEFAULT 0);
CREATE TABLE found.classes(class INTEGER PRIMARY KEY, label INTEGER NOT NULL);
"""


def make_plan(
    path: Path,
    train: Sequence[Source],
    val: Source | None,
    how: SplitOptions,
    image_options: ImageOptions,
    options: Mapping[str, Any],
) -> list[str]:
    """Write the plan as a new table at path; return warnings about the sources.

    Every split is in seeded shuffled order, validation too, so that any first part of it is a fair
    sample. options are stored in the table. Raises DataError for images that cannot be packed
    together, ConfigError when the labeled images cannot be drawn.
    """
    for old in (path, _scratch(path)):
        old.unlink(missing_ok=True)
    try:
        with table_errors(path), closing(create_table(path)) as table:
            table.execute("ATTACH CAST(? AS TEXT) AS found", (to_utf8(str(_scratch(path))),))
            table.executescript("PRAGMA found.journal_mode=OFF; PRAGMA found.synchronous=OFF;")
            table.executescript(_FOUND)
            # Sorting needs as much space again: use this disk, not that of /tmp.
            with suppress(sqlite3.Error, ValueError):
                table.execute(f"PRAGMA temp_store_directory = '{_quoted(path.parent)}'")
            table.execute("BEGIN")
            warnings = _Planner(table, path.parent, how, image_options, options).run(train, val)
            table.execute("COMMIT")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        _scratch(path).unlink(missing_ok=True)
    return warnings


def _quoted(folder: Path) -> str:
    return str(folder.absolute()).replace("'", "''")


def _scratch(path: Path) -> Path:
    return path.with_name(path.name + ".found")


class _Planner:
    """Fills the table from the sources, in steps."""

    def __init__(
        self,
        table: sqlite3.Connection,
        work: Path,
        how: SplitOptions,
        image_options: ImageOptions,
        options: Mapping[str, Any],
    ) -> None:
        self._table, self._work, self._how, self._image_options = table, work, how, image_options
        self._options = options
        self._class_numbers: dict[str, int] = {}

    def run(self, train: Sequence[Source], val: Source | None) -> list[str]:
        """Fill the table; return warnings."""
        warnings = [line for source in train for line in self._list(source, TRAIN)]
        self._require_unique(TRAIN, " + ".join(source.spec for source in train))
        if val is not None:
            warnings += self._list(val, VAL)
            self._require_unique(VAL, val.spec)
        warnings += self._label_classes(train, val)
        self._choose_labeled()
        first_id = shard = 0
        for group in shard_groups(self._how.layout, self._how.unlabeled, val=val is not None):
            first_id, shard = self._place(group, first_id, shard)
        self._table.execute("INSERT INTO plan VALUES (?)", (json.dumps(dict(self._options)),))
        return warnings

    def _list(self, source: Source, part: int) -> list[str]:
        """Add a source and its images; return its warnings."""
        number = self._value("SELECT count(*) FROM sources")
        unpacked = source.file.parent == self._work
        file = to_utf8(source.file.name if unpacked else str(source.file.absolute()))
        self._table.execute(
            "INSERT INTO sources VALUES (?, CAST(? AS TEXT), ?, CAST(? AS TEXT), ?, ?)",
            (number, to_utf8(source.spec), source.kind, file, source.size, source.stamp),
        )
        self._table.executemany(
            "INSERT INTO found.images VALUES "
            "(?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?, ?, 0)",
            self._found(source, part, number),
        )
        return source.warnings

    def _found(self, source: Source, part: int, number: int) -> Iterator[tuple[object, ...]]:
        numbers = self._class_numbers
        shuffle = self._how.order == "shuffle"
        seed = f"order:{self._how.shuffle_seed}"
        for image in source.images():
            if abs(image.stamp) >= 1 << 63:
                raise DataError(f"{source.spec}: {image.path}: its time is after 2262; touch it")
            yield (
                part,
                number,
                numbers.setdefault(image.class_name, len(numbers)),
                to_utf8(image.name),
                to_utf8(image.path),
                image.start,
                image.size,
                image.stamp,
                hash_rank(seed, f"{image.class_name}/{image.name}")[:16] if shuffle else b"",
            )

    def _require_unique(self, part: int, spec: str) -> None:
        names = list(self._class_numbers)
        query = "FROM found.images WHERE part = ? GROUP BY class, name HAVING count(*) > 1"
        twice = self._value(f"SELECT count(*) FROM (SELECT 1 {query})", part)
        if twice:
            few = self._table.execute(f"SELECT class, name {query} LIMIT 10", (part,))
            listed = sorted(f"{names[number]}/{name}" for number, name in few)
            more = f" and {twice - len(listed)} more" if twice > len(listed) else ""
            raise DataError(
                f"{spec}: {twice} names occur more than once as class/name: {', '.join(listed)}"
                f"{more}; does it hold several splits? Then name one folder of it"
            )

    def _label_classes(self, train: Sequence[Source], val: Source | None) -> list[str]:
        """Assign a label to every class; warn about classes without validation images."""
        names = _class_order(train) or sorted(self._classes_in(TRAIN))
        labels = {name: label for label, name in enumerate(names)}
        known = self._classes_in(VAL) & labels.keys()
        if val is not None and _is_numbered(val, len(names)):
            other = [name for name in sorted(known) if labels[name] != int(name)]
            if other:
                raise DataError(
                    f"{val.spec}: its labels are numbers, and so are the names of the training "
                    f"classes, in another order (class {other[0]} has label {labels[other[0]]}); "
                    "give it class folders or --val-labels"
                )
            if not known:
                labels |= {str(label): label for label in range(len(names))}
        self._require_known(TRAIN, " + ".join(source.spec for source in train), labels)
        if val is not None:
            self._require_known(VAL, val.spec, labels)
        rows = [(label, to_utf8(name)) for label, name in enumerate(names)]
        self._table.executemany("INSERT INTO classes VALUES (?, CAST(? AS TEXT))", rows)
        self._table.executemany(
            "INSERT INTO found.classes VALUES (?, ?)",
            ((number, labels[name]) for name, number in self._class_numbers.items()),
        )
        absent = len(names) - len({labels[name] for name in self._classes_in(VAL)})
        if val is not None and absent:
            return [f"{val.spec}: has no image of {absent} of the classes"]
        return []

    def _require_known(self, part: int, spec: str, labels: Mapping[str, int]) -> None:
        unknown = sorted(self._classes_in(part) - labels.keys())
        if unknown:
            where = "the training source" if part == VAL else "the list that numbers the classes"
            raise DataError(
                f"{spec}: {len(unknown)} classes are not in {where}: {first_few(unknown)}"
            )

    def _classes_in(self, part: int) -> set[str]:
        names = list(self._class_numbers)
        query = "SELECT DISTINCT class FROM found.images WHERE part = ?"
        return {names[number] for (number,) in self._table.execute(query, (part,))}

    def _choose_labeled(self) -> None:
        names = list(self._class_numbers)
        query = f"SELECT rowid, class, name FROM found.images WHERE part = {TRAIN}"
        images = ((row, names[number], name) for row, number, name in self._table.execute(query))
        how = self._how
        chosen = choose_labeled(images, how.labeled, seed=how.split_seed, balance=how.balance)
        self._table.executemany(
            "UPDATE found.images SET labeled = 1 WHERE rowid = ?", ((row,) for row in chosen)
        )
        left = f"SELECT count(*) FROM found.images WHERE part = {TRAIN} AND NOT labeled"
        if how.unlabeled == "rest" and not self._value(left):
            raise DataError(
                "--unlabeled rest: no image is left, all are labeled; use --unlabeled all"
            )

    def _place(self, group: ShardGroup, first_id: int, first_shard: int) -> tuple[int, int]:
        """Add the records and shards of a group; return the next id and shard number."""
        count, size = self._table.execute(
            f"SELECT count(*), total(size) FROM found.images WHERE {group.where}"
        ).fetchone()
        if first_id + count > ID_LIMIT:
            raise DataError(
                f"{first_id + count} records and more: the format has {ID_LIMIT} ids; pack in parts"
            )
        shards = min(count, self._how.shards or -(-int(size) // self._how.shard_size) or 1)
        assigner = ShardAssigner(count, int(size), shards)
        digests = [ShardDigest(self._image_options) for _ in range(shards)]
        rows = self._rows(group, first_id)
        self._table.executemany(
            "INSERT INTO records VALUES (?, ?, ?, CAST(? AS TEXT), ?, CAST(? AS TEXT), ?, ?, ?)",
            _digested(rows, assigner, digests, self._source_stamps()),
        )
        first = first_id
        for number, digest in enumerate(digests):
            file = shard_file(group.prefix, number, shards)
            row = (first_shard + number, group.prefix, file, first, digest.records, digest.bytes)
            values = (*row, digest.content(file), digest.stamps())
            self._table.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            first += digest.records
        return first_id + count, first_shard + shards

    def _rows(self, group: ShardGroup, first_id: int) -> Iterator[RecordRow]:
        query = (
            "SELECT label, labeled, images.name, source, path, start, size, stamp "
            "FROM found.images JOIN found.classes USING (class) "
            f"WHERE {group.where} ORDER BY rank, label, images.name"
        )
        for number, row in enumerate(self._table.execute(query), first_id):
            yield RecordRow(number, *row)

    def _source_stamps(self) -> list[int]:
        query = "SELECT stamp FROM sources ORDER BY number"
        return [stamp for (stamp,) in self._table.execute(query)]

    def _value(self, query: str, *values: object) -> int:
        (value,) = self._table.execute(query, values).fetchone()
        return int(value)


def _class_order(sources: Sequence[Source]) -> tuple[str, ...] | None:
    """Return the class names by label if sources number their labels; None: sort by name."""
    orders = [(source.spec, source.class_order) for source in sources]
    longest = max((order for _, order in orders if order is not None), key=len, default=None)
    for spec, order in orders:
        if longest is not None and order is not None and order != longest[: len(order)]:
            raise DataError(f"{spec}: its labels mean other classes than another source's")
    return longest


def _is_numbered(source: Source, classes: int) -> bool:
    """Return whether classes have only numbers in a source: a list of a flat folder."""
    order = source.class_order or ()
    return 0 < len(order) <= classes and order == tuple(map(str, range(len(order))))


def _digested(
    rows: Iterator[RecordRow],
    assigner: ShardAssigner,
    digests: Sequence[ShardDigest],
    source_stamps: Sequence[int],
) -> Iterator[tuple[object, ...]]:
    for row in rows:
        stamp = row.stamp if row.start < 0 else source_stamps[row.source]
        digests[assigner.assign(row.size)].add(row, stamp)
        yield (*row[:3], to_utf8(row.name), row.source, to_utf8(row.path), *row[6:])
