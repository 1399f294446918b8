"""Table of a pack: a SQLite file with one row per record, planned first and completed at the end.

Every process and machine reads only the rows of its shard, so that no process's memory grows with
the dataset. As `records.sqlite` it is part of the finished pack: the source of each record, its
position, and the checksum of its image.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import DataError, OutputError
from mpl_fast.untrusted import file_in, json_value

TABLE = "records.sqlite"

_SCHEMA = """
CREATE TABLE plan(options TEXT NOT NULL);  -- one row: JSON
CREATE TABLE classes(label INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE sources(number INTEGER PRIMARY KEY, spec TEXT NOT NULL, kind TEXT NOT NULL,
                     file TEXT NOT NULL, size INTEGER NOT NULL, stamp INTEGER NOT NULL);
CREATE TABLE shards(number INTEGER PRIMARY KEY, prefix TEXT NOT NULL, file TEXT NOT NULL,
                    first_id INTEGER NOT NULL, records INTEGER NOT NULL, bytes INTEGER NOT NULL,
                    content TEXT NOT NULL, stamps TEXT NOT NULL);
CREATE TABLE records(id INTEGER PRIMARY KEY, label INTEGER NOT NULL, labeled INTEGER NOT NULL,
                     name TEXT NOT NULL, source INTEGER NOT NULL, path TEXT NOT NULL,
                     start INTEGER NOT NULL, size INTEGER NOT NULL, stamp INTEGER NOT NULL);
"""
_TITLES = "CREATE TABLE titles(label INTEGER PRIMARY KEY, title TEXT NOT NULL)"
_SPOOL = "spool-"
_WRITTEN = """
DROP TABLE IF EXISTS written;
CREATE TABLE written(id INTEGER PRIMARY KEY, offset INTEGER NOT NULL, length INTEGER NOT NULL,
                     size INTEGER NOT NULL, crc32 INTEGER NOT NULL);
"""


class SourceRow(NamedTuple):
    """A source: a folder of image files, or one file that contains all images."""

    number: int
    spec: str  # as the user wrote it
    # "folder"; "shards" (byte ranges of files in one folder); or byte ranges of one file, which are
    # the images ("archive", "unpacked") or contain them ("records", "zip").
    kind: str
    # The folder or file to read. Of what has to be unpacked: its spool file beside the plan, stored
    # without that folder; in a finished pack, which has no spool files, the spec.
    file: str
    size: int  # bytes of that file; 0 for a folder
    stamp: int  # modification time in ns of the file; 0 for a folder


class ShardRow(NamedTuple):
    """One .rec file, with the records first_id to first_id + records - 1."""

    number: int
    prefix: str  # of the files that are joined: train, train_label, train_unlabel or val
    file: str
    first_id: int
    records: int
    bytes: int  # of its images as they are in the source
    content: str  # sha256 of all that determines its bytes, except the images' content
    stamps: str  # sha256 of the paths, offsets and times of its images, to detect changes

    @property
    def ids(self) -> tuple[int, int]:
        """The first and the last record id."""
        return self.first_id, self.first_id + self.records - 1


class RecordRow(NamedTuple):
    """One planned record, with the byte range of its image."""

    id: int
    label: int  # NO_LABEL if the image has none
    labeled: int  # 1 when the image is one of the labeled ones
    name: str  # file name, without folders; of an image without a label: its path
    source: int
    path: str  # inside its source, with "/"
    start: int  # byte offset; -1: the whole file; in "records": of the record's frame
    size: int  # bytes of the image; in "records": of the framed record
    stamp: int  # modification time in ns of a file of its own, else 0


class WrittenRow(NamedTuple):
    """Position of a record in its .rec file."""

    id: int
    offset: int  # of its frame in the .rec file
    length: int  # bytes of the framed record, a multiple of 4
    size: int  # bytes of the image
    crc32: int  # of the image


def create_table(path: Path) -> sqlite3.Connection:
    """Create a table at path, which must not exist; without journal, for a temporary file."""
    connection = edit_table(path)
    connection.executescript(_SCHEMA)
    return connection


def edit_table(path: Path) -> sqlite3.Connection:
    """Open the table at path for writing; without journal, for a temporary file."""
    connection = sqlite3.connect(own_uri(path), uri=True, isolation_level=None)
    connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
    return with_bytes_kept(connection)


def own_uri(path: Path) -> str:
    """Name a database that no other process opens meanwhile: some file systems have no locks."""
    return f"{path.resolve().as_uri()}?nolock=1"


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite while writing the table, as on a full disk, into an OutputError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from error


@contextmanager
def open_table(path: Path) -> Iterator["Table"]:
    """Open a table that is no longer written, read-only and without locks; DataError names it."""
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        connection = with_bytes_kept(sqlite3.connect(uri, uri=True))
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be opened ({error}); is the folder complete?") from error
    try:
        yield Table(connection, path.parent.absolute())
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path}: damaged ({error}); pack again") from error
    finally:
        connection.close()


def with_bytes_kept(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Make a connection return texts as file names are, valid UTF-8 or not."""
    connection.text_factory = methodcaller("decode", "utf-8", "surrogateescape")
    return connection


def to_utf8(text: str) -> bytes:
    """Return the bytes of a text, those of a file name as they are."""
    return text.encode("utf-8", "surrogateescape")


def sql_text(text: str) -> str | bytes:
    """Return text for `CAST(? AS TEXT)`: sqlite3 refuses strings that are no valid UTF-8."""
    return text if text.isascii() else to_utf8(text)


class Table:
    """Typed access to the rows of an open table."""

    def __init__(self, connection: sqlite3.Connection, folder: Path = Path()) -> None:
        self._connection = connection
        self.folder = folder

    def options(self) -> dict[str, Any]:
        """Return the options that the plan was made with."""
        row = self._connection.execute("SELECT options FROM plan").fetchone()
        try:
            options = json_value(row[0])
        except (TypeError, ValueError) as error:
            raise self._damaged(f"its options: {error}") from error
        if not isinstance(options, dict):
            raise self._damaged("its options are no object")
        return options

    def classes(self) -> list[str]:
        """Return the class names; the position is the label."""
        return [name for (name,) in self._connection.execute("SELECT name FROM classes")]

    def titles(self) -> list[str]:
        """Return the titles of the classes by label, "" for none; empty if no class has one."""
        if not list(self.query("SELECT 1 FROM sqlite_master WHERE name = 'titles'")):
            return []
        return [title for (title,) in self.query("SELECT title FROM titles")]

    def sources(self) -> list[SourceRow]:
        """Return the sources, by number."""
        rows = map(SourceRow._make, self._connection.execute("SELECT * FROM sources"))
        return [
            row._replace(file=str(self.folder / row.file)) if row.file.startswith(_SPOOL) else row
            for row in rows
        ]

    def shards(self) -> list[ShardRow]:
        """Return the shards in the order of their records."""
        shards = [ShardRow(*row) for row in self._connection.execute("SELECT * FROM shards")]
        try:
            for shard in shards:  # files that are written and replaced
                file_in(self.folder, shard.file)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        return shards

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.folder / TABLE}: damaged ({what}); pack again")

    def records(self, shard: ShardRow) -> Iterator[RecordRow]:
        """Yield the planned records of a shard in order."""
        query = "SELECT * FROM records WHERE id BETWEEN ? AND ? ORDER BY id"
        for row in self._connection.execute(query, shard.ids):
            yield RecordRow(*row)

    def record(self, record_id: int) -> RecordRow | None:
        """Return one planned record; None when there is no such id."""
        query = "SELECT * FROM records WHERE id = ?"
        row = self._connection.execute(query, (record_id,)).fetchone()
        return RecordRow(*row) if row else None

    def written(self, ids: tuple[int, int]) -> Iterator[tuple[RecordRow, WrittenRow]]:
        """Yield the written records with ids from ids[0] to ids[1] in order."""
        query = (
            "SELECT records.*, written.* FROM written JOIN records USING (id) "
            "WHERE id BETWEEN ? AND ? ORDER BY id"
        )
        width = len(RecordRow._fields)
        # USING gives one id column for `records.*` and again for `written.*`.
        for row in self._connection.execute(query, ids):
            yield RecordRow(*row[:width]), WrittenRow(*row[width:])

    def query(self, sql: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of any other query."""
        # Not `yield from`: a half-read result may be closed after the connection.
        for row in self._connection.execute(sql, values):  # noqa: UP028
            yield row


def blocks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Yield rows a thousand at a time, which take less time together."""
    some = iter(rows)
    while block := [*islice(some, 1000)]:
        yield block


def insert_rows(
    connection: sqlite3.Connection, table: str, row: str, rows: Iterable[tuple[object, ...]]
) -> None:
    """Insert rows, of which `row` has the placeholders.

    A hundred with one statement: that takes two thirds of the time of `executemany`. Older versions
    of SQLite accept 999 placeholders.
    """
    some = iter(rows)
    while block := [*islice(some, 100)]:
        values = ",".join([row] * len(block))
        connection.execute(f"INSERT INTO {table} VALUES {values}", [*chain.from_iterable(block)])


def create_written(connection: sqlite3.Connection) -> None:
    """Add the empty table of written records."""
    connection.executescript(_WRITTEN)


def add_titles(connection: sqlite3.Connection, titles: Iterable[str]) -> None:
    """Add the table of the titles of the classes, which packs without titles do not have."""
    connection.execute(_TITLES)
    rows = ((label, sql_text(title)) for label, title in enumerate(titles))
    connection.executemany("INSERT INTO titles VALUES (?, CAST(? AS TEXT))", rows)


def image_key(classes: Mapping[int, str] | list[str], record: RecordRow) -> str:
    """Return `class/name`, the name of an image in messages."""
    return listed_name(classes, record.label, record.name)


def listed_name(classes: Mapping[int, str] | list[str], label: int, name: str) -> str:
    """Return the name of a record in a .lst: `class/name`, or its path if it has no label."""
    return name if label == NO_LABEL else f"{classes[label]}/{name}"


def origin_of(source: SourceRow, record: RecordRow) -> str:
    """Return the origin of a record's image, as a path or `archive: member`."""
    if source.kind == "folder":
        return str(Path(source.file, record.path))
    return f"{source.spec}: {record.path}"


def source_entry(source: SourceRow, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's entry of a source; `unlabeled` marks those of --unlabeled-src."""
    entry: dict[str, Any] = {"spec": source.spec, "kind": source.kind}
    # They are planned last.
    has_val = options["val"] is not None and "val_seed" not in options  # else it is of src
    labeled = len(options["src"]) + has_val
    return entry | ({"unlabeled": True} if source.number >= labeled else {})
