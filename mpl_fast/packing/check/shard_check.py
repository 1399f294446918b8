"""Checks the files of one finished shard, and attributes damage to its records.

The manifest's checksum decides whether a file is as it was written. If a .rec file is not,
each of its records is compared with the table.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import load_manifest, text_hashes
from mpl_fast.data.records import frame, record_head, unframe
from mpl_fast.errors import DataError
from mpl_fast.packing.checksum import checksum_of, file_checksum
from mpl_fast.packing.plan.table import (
    TABLE,
    RecordRow,
    ShardRow,
    WrittenRow,
    image_key,
    open_table,
    origin_of,
)
from mpl_fast.packing.write.image_check import find_fault
from mpl_fast.packing.write.pool import Advance

CHANGED = "is not the manifest's"
_UNDECODABLE = "undamaged, but cannot be decoded"


@dataclass(frozen=True)
class Problem:
    """A fault of a file of a pack, and of which record if it is a single one."""

    file: str
    text: str
    record: int | None = None
    image: str = ""  # class/name
    source: str = ""  # where that image came from

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.file}: {self.text}"
        return f"{self.file}: record {self.record} ({self.image}, from {self.source}): {self.text}"

    @property
    def undecodable(self) -> bool:
        """The file is as it was written, but holds no image there."""
        return self.text.startswith(_UNDECODABLE)

    def as_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}


def check_shard(
    root: Path, entry: Mapping[str, Any], shard: ShardRow | None, deep: bool, advance: Advance
) -> list[Problem]:
    """Return all faults of the .rec file of a manifest's entry and of its own .idx file.

    shard is its row in the table, None when the table is damaged: then no record is compared. deep
    also compares the records of an undamaged file and decodes their images. advance is called with
    the records and bytes done since its last call.
    """

    def hashed(size: int) -> None:
        advance(0, 0 if deep else size)

    name = entry["file"]
    fault = file_fault(root, name, *checksum_of(entry), hashed)
    problems: list[Problem] = []
    if shard and (fault.endswith(CHANGED) or (deep and not fault)):
        try:
            problems += _record_problems(root, entry, shard, deep, advance)
        except OSError as error:  # the file is read a second time
            problems.append(Problem(name, error.strerror or str(error)))
        fault = fault and f"every record is as the table has it, but {fault}"
    if fault and not problems:
        problems.append(Problem(name, fault))
    if "idx" in entry and (fault := file_fault(root, entry["idx"], "sha256", entry["idx_sha256"])):
        problems.append(Problem(entry["idx"], fault))
    if not deep:
        advance(entry["records"], 0)
    return problems


def file_fault(
    root: Path,
    name: str,
    kind: str,
    checksum: str,
    progress: Callable[[int], None] = lambda size: None,
) -> str:
    """Return why a file does not have this crc32 or sha256, or ""; progress gets bytes read."""
    try:
        found = file_checksum(root / name, kind, progress)
    except OSError as error:
        return error.strerror or str(error)
    if found == checksum:
        return ""
    # Files may have been swapped.
    manifest = load_manifest(root)
    known = {file: ("sha256", sha256) for file, sha256 in text_hashes(manifest).items()}
    known |= {shard["file"]: checksum_of(shard) for shard in manifest["shards"]}
    owner = next((file for file, other in known.items() if other == (kind, found)), None)
    return f"holds the content of {owner}" if owner else f"its {kind} {CHANGED}"


def _record_problems(
    root: Path, entry: Mapping[str, Any], shard: ShardRow, deep: bool, advance: Advance
) -> Iterator[Problem]:
    file = entry["file"]
    with open_table(root / TABLE) as table, (root / file).open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < entry["bytes"]:
            yield Problem(file, f"cut short: {size} of {entry['bytes']} bytes")
        elif size > entry["bytes"]:
            yield Problem(file, f"{size - entry['bytes']} bytes too many at its end")
        classes, sources = table.classes(), table.sources()
        for record, written in table.written(shard.ids):
            text = _record_fault(stream.read(written.length), record, written, deep)
            if text:
                key, source = image_key(classes, record), origin_of(sources[record.source], record)
                yield Problem(file, text, record.id, key, source)
            advance(*((1, written.length) if deep else (0, 0)))


def _record_fault(framed: bytes, record: RecordRow, written: WrittenRow, deep: bool) -> str:
    """Return what is wrong with a record, or "" if it is as the table has it."""
    if len(framed) < written.length:
        return "is cut short" if framed else "is missing"
    try:
        payload = unframe(framed)
    except DataError:
        return "its frame is damaged"
    header = record_head(record.label, record.id, written.size)[8:]
    image = payload[len(header) :]
    if len(image) != written.size:
        return "its frame is damaged"
    if not payload.startswith(header):
        return "its header is damaged"
    if zlib.crc32(image) != written.crc32:
        return "its image is damaged"
    if frame(payload) != framed:
        return "its padding is damaged"
    fault = find_fault(image, "decode") if deep else None
    return f"{_UNDECODABLE}: {fault}" if fault else ""
