"""The table returns the rows written to it, with names of any bytes, and reports damage."""

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.plan.table import (
    RecordRow,
    ShardRow,
    SourceRow,
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
ROWS: dict[str, Sequence[tuple[object, ...]]] = {
    "plan": [('{"src": ["\\udcff"]}',)],
    "classes": [(0, "ant"), (1, f"bee{ODD}")],
    "sources": SOURCES,
    "shards": SHARDS,
    "records": RECORDS,
    "written": WRITTEN,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a table with these rows, in a folder of an odd name."""
    path = tmp_path / ODD / "records.sqlite"
    path.parent.mkdir()
    with closing(create_table(path)) as connection:
        create_written(connection)
        for name, rows in ROWS.items():
            for row in rows:
                marks = ["CAST(? AS TEXT)" if isinstance(value, str) else "?" for value in row]
                values = [to_utf8(value) if isinstance(value, str) else value for value in row]
                connection.execute(f"INSERT INTO {name} VALUES ({','.join(marks)})", values)
    return path


def test_rows(path: Path) -> None:
    before = path.stat()
    with open_table(path) as table, open_table(path) as other:
        assert table.options() == {"src": ["\udcff"]}
        assert table.classes() == other.classes() == ["ant", f"bee{ODD}"]
        assert table.sources() == SOURCES
        assert table.shards() == SHARDS
        assert [list(table.records(shard)) for shard in SHARDS] == [RECORDS[:2], RECORDS[2:]]
        assert (table.record(1), table.record(3)) == (RECORDS[1], None)
        assert list(table.query("SELECT sum(size) FROM records WHERE source = ?", (1,))) == [(25,)]
        assert [written_rows(table, shard) for shard in SHARDS] == [  # one image was skipped
            [(RECORDS[0], WRITTEN[0])],
            [(RECORDS[2], WRITTEN[1])],
        ]
        # Names are stored as text with their bytes, not as blobs.
        query = "SELECT typeof(path), hex(path) FROM records WHERE id = 0"
        assert list(table.query(query)) == [("text", to_utf8(RECORDS[0].path).hex().upper())]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            list(other.query("DELETE FROM classes WHERE label = 0 RETURNING label"))
        assert image_key(table.classes(), RECORDS[0]) == f"bee{ODD}/a.jpg"
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert list(path.parent.iterdir()) == [path]
    assert origin_of(SOURCES[0], RECORDS[0]) == f"/{ODD}/{ODD}/a.jpg"
    assert origin_of(SOURCES[1], RECORDS[1]) == "x.tar: ant/b.jpg"


def test_create_written_deletes_all_rows(path: Path) -> None:
    with closing(edit_table(path)) as connection:
        create_written(connection)
    with open_table(path) as table:
        assert list(table.query("SELECT * FROM written")) == []


def test_table_missing_or_there_already(path: Path, tmp_path: Path) -> None:
    missing = pytest.raises(DataError, match=f"^{tmp_path}/none: cannot be opened .*complete")
    with missing, open_table(tmp_path / "none"):
        pass
    assert list(tmp_path.iterdir()) == [path.parent]
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        create_table(path)


@pytest.mark.parametrize("content", [b"text", b"", bytes(4096), None])
def test_damaged_table(path: Path, content: bytes | None) -> None:
    """Other files, and with None a table that is cut short."""
    path.write_bytes(path.read_bytes()[:4096] if content is None else content)
    message = f"^{re.escape(str(path))}: damaged"
    with pytest.raises(DataError, match=message), open_table(path) as table:
        table.shards()


def test_full_disk(path: Path) -> None:
    full = pytest.raises(OutputError, match=r"records.sqlite: cannot be written \(.*is full\)")
    with full, table_errors(path), closing(edit_table(path)) as connection:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("INSERT INTO classes VALUES (2, ?)", ("c" * 100_000,))
