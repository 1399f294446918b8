"""Finds one record of a finished pack by position, id or name; the locate and extract commands."""

import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpl_fast.atomic import atomic_path
from mpl_fast.data.records import ID_LIMIT, NO_LABEL, parse_payload, unframe
from mpl_fast.errors import DataError, OutputError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.packing.check.load_pack import load_pack, require_table
from mpl_fast.packing.plan.layout import planned_splits
from mpl_fast.packing.plan.table import (
    TABLE,
    RecordRow,
    Table,
    WrittenRow,
    image_key,
    open_table,
    origin_of,
    sql_text,
)

_PLACE = re.compile(r"([\w.-]+\.rec)[\"']?,?\s+(?:at\s+)?(?:index\s+)?(\d+)\b")


@dataclass(frozen=True)
class Found:
    """One record of a finished pack."""

    id: int
    label: int | None  # None: it has none
    image: str  # class/name, or without a label its path
    source: str  # where the image came from
    splits: tuple[str, ...]  # that list it
    shard: str
    offset: int  # of the record in that file
    length: int  # bytes of the record
    size: int  # bytes of its image
    crc32: int  # of its image
    title: str  # of its class; "": it has none

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the fields as text, one a line."""
        fields = asdict(self) | {"splits": ", ".join(self.splits), "crc32": f"{self.crc32:08x}"}
        title = fields.pop("title")
        if self.label is None:
            fields["label"] = "none"
        elif title:
            fields["label"] = f"{self.label} ({title})"
        return [f"{name:<7} {value}" for name, value in fields.items()]


def locate(root: Path, text: str) -> Found:
    """Return the record at a position that DALI prints as "PATH at index OFFSET".

    text is a line that contains this, or `FILE OFFSET`. The offset counts within that file and may
    be inside the record. Raises DataError when there is none.
    """
    manifest = load_pack(root)
    require_table(root, manifest)
    match = _PLACE.search(text)
    if not match:
        raise DataError(
            f"{text!r} names no record; give what DALI prints, `FILE.rec at index OFFSET`, where "
            "the offset counts in that file"
        )
    file, offset = match[1], int(match[2])
    entry = next((entry for entry in manifest["shards"] if entry["file"] == file), None)
    if entry is None:
        files = first_few((entry["file"] for entry in manifest["shards"]), 3)
        raise DataError(f"{root}: has no {file}; its files are {files}")
    if offset >= entry["bytes"]:
        raise DataError(f"{root / file}: has {entry['bytes']} bytes, so no record at {offset}")
    with open_table(root / TABLE) as table:
        query = (
            "SELECT max(written.id) FROM written JOIN shards ON written.id "
            "BETWEEN first_id AND first_id + records - 1 WHERE file = ? AND offset <= ?"
        )
        ((number,),) = table.query(query, (file, offset))
        ((record, written),) = table.written((number, number))
        return _found(table, record, written)


def find(root: Path, what: str) -> Found:
    """Return the record with the id, class/name or name `what`; of equal images, the first.

    Raises DataError when there is none, or when several have this name and differ.
    """
    require_table(root, load_pack(root))
    with open_table(root / TABLE) as table:
        classes = table.classes()
        planned = _with_id(table, what) or _with_name(table, classes, what)
        if not planned:
            raise DataError(f"{root}: has no {what}; give an id, class/name or name of its .lst")
        rows = [row for record in planned for row in table.written((record.id, record.id))]
        if not rows:
            raise DataError(f"{root}: {what} was left out when this was packed; see info")
        if len({(written.size, written.crc32) for _, written in rows}) > 1:
            listed = [f"{record.id} ({image_key(classes, record)})" for record, _ in rows]
            raise DataError(
                f"{root}: {len(listed)} images are called {what}; give the id of one: "
                f"{first_few(listed)}"
            )
        return _found(table, *rows[0])


def extract(root: Path, what: str) -> tuple[Found, bytes]:
    """Return the result of find, and the image; DataError when it is damaged."""
    found = find(root, what)
    path = root / found.shard
    try:
        with path.open("rb") as file:
            framed = os.pread(file.fileno(), found.length, found.offset)
        image = parse_payload(unframe(framed)).image
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise _damaged(path, found, str(error)) from error
    if len(image) != found.size or zlib.crc32(image) != found.crc32:
        raise _damaged(path, found, "its checksum is wrong")
    return found, image


def save(image: bytes, path: Path, *, force: bool) -> None:
    """Write an image to path atomically; OutputError when the file exists, unless force."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise OutputError(f"{path}: is there already; --force replaces it")
    own = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path), atomic_path(path, own) as temporary:
        temporary.write_bytes(image)


def _damaged(path: Path, found: Found, reason: str) -> DataError:
    return DataError(
        f"{path}: record {found.id} ({found.image}) is damaged: {reason}; make_rec.py verify finds "
        "all damage"
    )


def _with_id(table: Table, what: str) -> list[RecordRow]:
    known = what.isdecimal() and len(what) <= len(str(ID_LIMIT))
    record = table.record(int(what)) if known else None
    return [record] if record else []


def _with_name(table: Table, classes: list[str], what: str) -> list[RecordRow]:
    """Return the records with the name or class/name `what`, or its path, by id."""
    query = "SELECT * FROM records WHERE name IN (CAST(? AS TEXT), CAST(? AS TEXT)) ORDER BY id"
    name = what.rpartition("/")[2]
    rows = [RecordRow(*row) for row in table.query(query, (sql_text(name), sql_text(what)))]
    return [row for row in rows if what in (row.name, image_key(classes, row))]


def _found(table: Table, record: RecordRow, written: WrittenRow) -> Found:
    options, titles = table.options(), table.titles()
    splits = planned_splits(options["layout"], options["unlabeled"], val=True)
    (shard,) = [s for s in table.shards() if s.first_id <= record.id < s.first_id + s.records]
    return Found(
        id=record.id,
        label=None if record.label == NO_LABEL else record.label,
        image=image_key(table.classes(), record),
        source=origin_of(table.sources()[record.source], record),
        splits=tuple(
            split.name for split in splits if split.prefix == shard.prefix and split.lists(record)
        ),
        shard=shard.file,
        offset=written.offset,
        length=written.length,
        size=written.size,
        crc32=written.crc32,
        title=titles[record.label] if titles and record.label != NO_LABEL else "",
    )
