"""Makes the plan of a pack: labels, labeled images, order, ids and shards, before an image is read.

The plan is the table (table.py). Everything that grows with the dataset is in SQLite files beside
it, so that the number of images is limited by the disk, not by memory.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mpl_fast.data.records import ID_LIMIT, NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.first_few import counted
from mpl_fast.packing.options import PackOptions, is_drawn
from mpl_fast.packing.plan.choose_labeled import add_hash_rank
from mpl_fast.packing.plan.draw_splits import draw_splits
from mpl_fast.packing.plan.equal_names import make_names_unique, require_files_once
from mpl_fast.packing.plan.label_classes import label_classes
from mpl_fast.packing.plan.layout import POOL, TRAIN, VAL, shard_groups
from mpl_fast.packing.plan.sharding import shard_digests, shard_file, shard_starts
from mpl_fast.packing.plan.table import (
    add_titles,
    create_table,
    insert_rows,
    own_uri,
    sql_text,
    table_errors,
)
from mpl_fast.packing.plan.twins import leave_out_twins
from mpl_fast.packing.sources.source import Image, Source, require_one_line

RECORD_BYTES = 96  # of a record besides its image, in all files of a pack but the table; about
TABLE_BYTES = 130  # of a record in the finished table; about
_FOUND = """
CREATE TABLE found.images(part INTEGER NOT NULL, source INTEGER NOT NULL, class INTEGER NOT NULL,
                          name TEXT NOT NULL, path TEXT NOT NULL, start INTEGER NOT NULL,
                          size INTEGER NOT NULL, stamp INTEGER NOT NULL,
                          labeled INTEGER NOT NULL);
CREATE TABLE found.classes(class INTEGER PRIMARY KEY, label INTEGER NOT NULL);
"""


def make_plan(
    path: Path,
    train: Sequence[Source],
    val: Source | None,
    options: PackOptions,
    pool: Sequence[Source] = (),
    *,
    warn: Callable[[list[str]], None],
) -> None:
    """Write the plan as a new table at path; `warn` of its sources, also before an error.

    Images of the sources in pool, and those of train that have no label, are unlabeled ones. With
    a --val such as 5% there is no source val: its images are drawn from those of train.

    Every split is in seeded shuffled order, validation too, so that any first part of it is a fair
    sample. Raises DataError for images that cannot be packed together, ConfigError when the labeled
    images cannot be drawn.
    """
    scratch = path.with_name(path.name + ".found")
    for old in (path, scratch):
        old.unlink(missing_ok=True)
    try:
        with table_errors(path), closing(create_table(path)) as table:
            table.execute("ATTACH ? AS found", (own_uri(scratch),))
            table.executescript("PRAGMA found.journal_mode=OFF; PRAGMA found.synchronous=OFF;")
            table.executescript(_FOUND)
            # Sorting needs as much space again: use this disk, not that of /tmp.
            folder = str(path.parent.absolute()).replace("'", "''")
            with suppress(sqlite3.Error, ValueError):
                table.execute(f"PRAGMA temp_store_directory = '{folder}'")
            table.execute("BEGIN")
            for line in _Planner(table, path.parent, options).run(train, val, pool):
                warn([line])
            table.execute("COMMIT")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        scratch.unlink(missing_ok=True)


@dataclass
class _Planner:
    """Fills the table from the sources, in steps."""

    table: sqlite3.Connection
    work: Path
    options: PackOptions
    class_numbers: dict[str, int] = field(default_factory=dict)
    names: Sequence[str] = ()  # of the classes in the pack, by label
    unlabeled: Counter[int] = field(default_factory=Counter)  # images by number of the source

    def run(
        self, train: Sequence[Source], val: Source | None, pool: Sequence[Source]
    ) -> Iterator[str]:
        """Fill the table; yield warnings."""
        yield from self._list_labeled(dict(enumerate(train)), TRAIN)
        if val is not None:
            yield from self._list_labeled({len(train): val}, VAL)
        sources = [*train, *([val] if val else [])]
        for source in pool:
            yield from self._list(source, POOL)
            yield from leave_out_twins(self.table, len(sources), source, sources)
            sources.append(source)
        if self.unlabeled:
            require_files_once(self.table, POOL, dict(enumerate(sources)))
        yield from self._label_classes(train, val)
        yield from draw_splits(self.table, self.names, self.options)
        how = self.options.split
        has_val = val is not None or is_drawn(self.options.val)
        groups = shard_groups(how.layout, how.unlabeled, val=has_val)
        # SQLite numbers new rows from the last one on.
        self.table.execute("INSERT INTO records VALUES (-1, 0, 0, '', 0, '', 0, 0, 0)")
        for prefix, where in groups.items():
            self._place(prefix, where)
        self.table.execute("DELETE FROM records WHERE id < 0")
        self.table.execute("INSERT INTO plan VALUES (?)", (json.dumps(self.options.planned()),))

    def _list_labeled(self, sources: Mapping[int, Source], part: int) -> Iterator[str]:
        """Add all sources of a part; yield their warnings."""
        for source in sources.values():
            yield from self._list(source, part)
        labels = [source.request.labels for source in sources.values() if source.request.labels]
        if labels:  # one file
            labels[0].require_fit()
        classes = list(self.class_numbers)
        yield from make_names_unique(self.table, part, sources, classes)

    def _list(self, source: Source, part: int) -> list[str]:
        """Add a source and its images; return its warnings."""
        number = self._value("SELECT count(*) FROM sources")
        unpacked = source.file.parent == self.work
        file = sql_text(source.file.name if unpacked else str(source.file.absolute()))
        self.table.execute(
            "INSERT INTO sources VALUES (?, CAST(? AS TEXT), ?, CAST(? AS TEXT), ?, ?)",
            (number, sql_text(source.spec), source.kind, file, source.size, source.stamp),
        )
        row = "(?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?, 0)"
        insert_rows(self.table, "found.images", row, self._found(source, part, number))
        if part == POOL or not self.unlabeled[number]:
            return source.warnings
        what = counted(self.unlabeled[number], "image has no label", "images have no label")
        return [*source.warnings, f"{source.spec}: {what} (-1): unlabeled images only"]

    def _found(self, source: Source, part: int, number: int) -> Iterator[tuple[object, ...]]:
        numbers = self.class_numbers
        for image in source.images():
            class_name, name, path, start, size, stamp = image
            if abs(stamp) >= 1 << 63:
                raise DataError(f"{source.spec}: {path}: its time is after 2262; touch it")
            place, class_number = part, numbers.get(class_name, NO_LABEL)
            if part == POOL or not class_name:
                _require_unlabeled(image, part, source.spec)
                # No class is made of its folder; its name is its path, which is unique.
                place, class_number, class_name, name = POOL, NO_LABEL, "", path
                self.unlabeled[number] += 1
            elif class_number == NO_LABEL:
                class_number = numbers[class_name] = len(numbers)
            yield place, number, class_number, sql_text(name), sql_text(path), start, size, stamp

    def _label_classes(self, train: Sequence[Source], val: Source | None) -> list[str]:
        """Assign a label to every class; return warnings."""
        trained, held = self._classes_in(TRAIN), self._classes_in(VAL)
        images = self._value(f"SELECT count(*) FROM found.images WHERE part = {TRAIN}")
        classes = label_classes(train, val, trained, held, images, self.options)
        rows = [(label, sql_text(name)) for label, name in enumerate(classes.names)]
        self.table.executemany("INSERT INTO classes VALUES (?, CAST(? AS TEXT))", rows)
        if classes.titles:
            add_titles(self.table, classes.titles)
        labels = [classes.labels[name] for name in self.class_numbers]
        self.table.executemany("INSERT INTO found.classes VALUES (?, ?)", enumerate(labels))
        self.table.execute("INSERT INTO found.classes VALUES (?, ?)", (NO_LABEL, NO_LABEL))
        self.names = classes.names
        return classes.warnings

    def _classes_in(self, part: int) -> set[str]:
        names = list(self.class_numbers)
        query = "SELECT DISTINCT class FROM found.images WHERE part = ?"
        return {names[number] for (number,) in self.table.execute(query, (part,))}

    def _place(self, prefix: str, where: str) -> None:
        """Add the records and shards of a group."""
        first_id = self._value("SELECT coalesce(max(id) + 1, 0) FROM records")
        first_shard = self._value("SELECT coalesce(max(number) + 1, 0) FROM shards")
        count, size = self.table.execute(
            f"SELECT count(*), total(size) FROM found.images WHERE {where}"
        ).fetchone()
        if first_id + count > ID_LIMIT:
            raise DataError(
                f"{first_id + count} records and more: the format has {ID_LIMIT} ids; pack in parts"
            )
        how = self.options.split
        rank = "" if how.order == "list" else "hash_rank(class, CAST(images.name AS BLOB)), "
        # Images without a class have the number -1: the last of these names.
        classes = [*self.class_numbers, ""]
        add_hash_rank(self.table, f"order:{how.shuffle_seed}", classes)
        self.table.execute(
            "INSERT INTO records (label, labeled, name, source, path, start, size, stamp) "
            "SELECT label, labeled, images.name, source, path, start, size, stamp "
            "FROM found.images JOIN found.classes USING (class) "
            f"WHERE {where} ORDER BY {rank}label, images.name, source, path"
        )
        shards = min(count, how.shards or -(-int(size) // how.shard_size) or 1)
        sizes = self.table.execute(
            "SELECT size FROM records WHERE id >= ? ORDER BY id", (first_id,)
        )
        starts = shard_starts(sizes, count, int(size), shards)
        for number, (start, end) in enumerate(pairwise([*starts, count])):
            file = shard_file(prefix, number, shards)
            ids = range(first_id + start, first_id + end)
            row = (first_shard + number, prefix, file, ids.start, len(ids))
            digests = shard_digests(self.table, file, ids, self.options.image)
            self.table.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row + digests)

    def _value(self, query: str, *values: object) -> int:
        (value,) = self.table.execute(query, values).fetchone()
        return int(value)


def _require_unlabeled(image: Image, part: int, spec: str) -> None:
    """DataError where an image cannot be an unlabeled one, called by its path."""
    if part == VAL:
        raise DataError(f"{spec}: {image.path}: has no label (-1), which validation images need")
    require_one_line(image.path, image.path, spec)
