"""The table returns the rows written to it, with names of any bytes, and reports damage."""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.plan.table import (
    RecordRow,
    ShardRow,
    SourceRow,
    Table,
    WrittenRow,
    create_table,
    create_written,
    edit_table,
    image_key,
    open_table,
    origin_of,
    table_errors,
    to_utf8,
)
from tests.packing.packs import written_rows

ODD = "\udcff o'n;e\"%?#"
SOURCES = [
    SourceRow(0, "tree", "folder", f"/{ODD}", 0, 0),
    SourceRow(1, "x.tar", "archive", "/s", 9, 8),
]
SHARDS = [
    ShardRow(0, "train", "train-00000-of-00002.rec", 0, 2, 30, "c0", "s0"),
    ShardRow(1, "train", "train-00001-of-00002.rec", 2, 1, 5, "c1", "s1"),
]
RECORDS = [
    RecordRow(0, 1, 0, "a.jpg", 0, f"{ODD}/a.jpg", -1, 10, 1_700_000_000_000_000_001),
    RecordRow(1, 0, 1, f"{ODD}.jpg", 1, "ant/b.jpg", 512, 20, 0),
    RecordRow(2, 1, 1, "c.jpg", 1, "c.jpg", 1 << 40, 5, 0),
]
WRITTEN = [WrittenRow(0, 0, 40, 10, (1 << 32) - 1), WrittenRow(2, 0, 1 << 29, 5, 0)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a table with these rows, in a folder of an odd name."""
    path = tmp_path / ODD / "records.sqlite"
    path.parent.mkdir()
    with closing(create_table(path)) as connection:
        connection.execute("INSERT INTO plan VALUES (?)", ('{"src": ["\\udcff"]}',))
        for label, name in enumerate(["ant", f"bee{ODD}"]):
            connection.execute(
                "INSERT INTO classes VALUES (?, CAST(? AS TEXT))", (label, to_utf8(name))
            )
        for source in SOURCES:
            values = (*source[:3], to_utf8(source.file), *source[4:])
            connection.execute("INSERT INTO sources VALUES (?,?,?,CAST(? AS TEXT),?,?)", values)
        connection.executemany("INSERT INTO shards VALUES (?,?,?,?,?,?,?,?)", SHARDS)
        for row in RECORDS:
            statement = "INSERT INTO records VALUES (?,?,?,CAST(? AS TEXT),?,CAST(? AS TEXT),?,?,?)"
            text, place = to_utf8(row.name), to_utf8(row.path)
            connection.execute(statement, (*row[:3], text, row.source, place, *row[6:]))
    return path


@pytest.fixture
def table(path: Path) -> Iterator[Table]:
    with closing(edit_table(path)) as connection:
        create_written(connection)
        connection.executemany("INSERT INTO written VALUES (?,?,?,?,?)", WRITTEN)
    with open_table(path) as table:
        yield table


def test_rows(table: Table) -> None:
    assert table.options() == {"src": ["\udcff"]}
    assert table.classes() == ["ant", f"bee{ODD}"]
    assert table.sources() == SOURCES
    assert table.shards() == SHARDS
    assert [list(table.records(shard)) for shard in SHARDS] == [RECORDS[:2], RECORDS[2:]]
    assert table.record(1) == RECORDS[1]
    assert table.record(3) is None
    assert list(table.query("SELECT sum(size) FROM records WHERE source = ?", (1,))) == [(25,)]


def test_written_records(path: Path, table: Table) -> None:
    """Skipped images are left out, and create_written deletes all rows."""
    assert [written_rows(table, shard) for shard in SHARDS] == [
        [(RECORDS[0], WRITTEN[0])],
        [(RECORDS[2], WRITTEN[1])],
    ]
    with closing(edit_table(path)) as connection:
        create_written(connection)
        assert written_rows(Table(connection), SHARDS[0]) == []


def test_displayed_names(table: Table) -> None:
    assert image_key(table.classes(), RECORDS[0]) == f"bee{ODD}/a.jpg"
    assert origin_of(SOURCES[0], RECORDS[0]) == f"/{ODD}/{ODD}/a.jpg"
    assert origin_of(SOURCES[1], RECORDS[1]) == "x.tar: ant/b.jpg"


def test_name_is_kept_as_its_bytes(path: Path) -> None:
    connection = sqlite3.connect(os.fsencode(path))
    connection.text_factory = bytes
    with closing(connection):
        query = "SELECT path, typeof(path) FROM records WHERE id = 0"
        assert connection.execute(query).fetchone() == (os.fsencode(f"{ODD}/a.jpg"), b"text")


def test_reading_changes_nothing(path: Path) -> None:
    before = path.stat()
    with open_table(path) as one, open_table(path) as other:
        assert one.classes() == other.classes()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            list(one.query("DELETE FROM classes WHERE label = 0 RETURNING label"))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert list(path.parent.iterdir()) == [path]


def test_no_table(tmp_path: Path) -> None:
    missing = pytest.raises(DataError, match=f"^{tmp_path}/none: cannot be opened .*complete")
    with missing, open_table(tmp_path / "none"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"text", b"", bytes(4096), None])
def test_damaged_table(path: Path, content: bytes | None) -> None:
    """Other files, and with None a table that is cut short."""
    path.write_bytes(path.read_bytes()[:4096] if content is None else content)
    message = f"^{re.escape(str(path))}: damaged"
    with pytest.raises(DataError, match=message), open_table(path) as table:
        table.shards()


def test_table_exists(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        create_table(path)


def test_full_disk(path: Path) -> None:
    full = pytest.raises(OutputError, match=r"records.sqlite: cannot be written \(.*is full\)")
    with full, table_errors(path), closing(edit_table(path)) as connection:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("INSERT INTO classes VALUES (2, ?)", ("c" * 100_000,))
