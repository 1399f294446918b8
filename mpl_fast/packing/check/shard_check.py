"""Checks one finished .rec file completely and attributes damage to its records.

The manifest's sha256 decides whether the file is as it was written. If it is not, its records are
compared with their rows in the table; if it is and they differ, the table is damaged.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpl_fast.atomic import sha256_of
from mpl_fast.data.manifest import load_manifest, text_hashes
from mpl_fast.errors import DataError
from mpl_fast.packing.check.record_check import Fault, ReadResult, RecordReader, whole_length
from mpl_fast.packing.plan.table import TABLE, ShardRow, Table, image_key, open_table, origin_of
from mpl_fast.packing.write.pool import Advance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Problem:
    """A fault of a file of a pack, and of which record if it is a single one."""

    file: str
    text: str
    record: int | None = None
    image: str = ""  # class/name
    source: str = ""  # where that image came from
    undecodable: bool = False  # the file is as it was written, but holds no image there

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.file}: {self.text}"
        return f"{self.file}: record {self.record} ({self.image}, from {self.source}): {self.text}"

    def as_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        fields = asdict(self)
        del fields["undecodable"]
        return {name: value for name, value in fields.items() if value not in (None, "")}


def check_shard(
    root: Path, entry: Mapping[str, Any], shard: ShardRow, deep: bool, advance: Advance
) -> list[Problem]:
    """Return all faults of the .rec file of a manifest's entry and of its own .idx file.

    deep also compares each image with its crc32 and decodes it. advance is called with the records
    and bytes read since its last call.
    """
    try:
        with open_table(root / TABLE) as table:
            rows = _rows(table, shard)
            misfit = _misfit(rows, entry)
            if misfit:
                raise DataError(f"damaged: {misfit}; pack again")
            problems = _check_records(root, entry, rows, deep, advance, table)
            return problems + _check_index(root, entry, rows)
    except DataError as error:
        return [table_problem(root, error), *check_hashes(root, entry, advance)]


def check_hashes(root: Path, entry: Mapping[str, Any], advance: Advance) -> list[Problem]:
    """Compare the files of check_shard with their checksums alone, without the table."""
    faults = {entry["file"]: file_fault(root, entry["file"], entry["sha256"], partial(advance, 0))}
    if "idx" in entry:
        faults[entry["idx"]] = file_fault(root, entry["idx"], entry["idx_sha256"])
    return [Problem(file, fault) for file, fault in faults.items() if fault]


def file_fault(
    root: Path, name: str, sha256: str, progress: Callable[[int], None] = lambda size: None
) -> str:
    """Return why a file does not have this sha256, or ""; progress is called with bytes read."""
    try:
        found = sha256_of(root / name, progress)
    except OSError as error:
        return error.strerror or str(error)
    if found == sha256:
        return ""
    owner = _owner(root, found)
    return f"holds the content of {owner}" if owner else "its sha256 is not the manifest's"


def _owner(root: Path, sha256: str) -> str | None:
    """Return the file of the pack that should have this sha256: files may have been swapped."""
    manifest = load_manifest(root)
    hashes = text_hashes(manifest) | {s["file"]: s["sha256"] for s in manifest["shards"]}
    return next((name for name, other in hashes.items() if other == sha256), None)


def table_problem(root: Path, error: DataError) -> Problem:
    """Return an error of reading the table as a problem of it."""
    return Problem(TABLE, str(error).removeprefix(f"{root / TABLE}: "))


def _rows(table: Table, shard: ShardRow) -> "NDArray[np.void]":
    """Return the written records of a shard from the table."""
    import numpy as np  # late: the command line's --help must not wait for it

    kinds = [("id", "<i8"), ("label", "<f4"), ("offset", "<i8"), ("length", "<i8")]
    kinds += [("size", "<i8"), ("crc32", "<u4")]
    query = (
        "SELECT id, label, offset, length, written.size, crc32 FROM written JOIN records USING (id)"
        " WHERE id BETWEEN ? AND ? ORDER BY id"
    )
    try:
        return np.fromiter(table.query(query, shard.ids), np.dtype(kinds))
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"damaged: {shard.file} has rows that are no numbers ({error})") from error


def _misfit(rows: "NDArray[np.void]", entry: Mapping[str, Any]) -> str:
    """Return why rows do not match the shard in the manifest, or ""."""
    ends = rows["offset"] + rows["length"]
    starts_right = len(rows) and rows["offset"][0] == 0 and ends[-1] == entry["bytes"]
    if len(rows) != entry["records"]:
        return f"{len(rows)} records of {entry['file']}, the manifest has {entry['records']}"
    if not starts_right or (rows["offset"][1:] != ends[:-1]).any():
        return f"the records of {entry['file']} do not fill its {entry['bytes']} bytes"
    if (rows["length"] % 4).any() or (rows["length"] < whole_length(rows)).any():
        return f"records of {entry['file']} have impossible lengths"
    return ""


def _check_index(root: Path, entry: Mapping[str, Any], rows: "NDArray[np.void]") -> list[Problem]:
    if "idx" not in entry:
        return []
    name = entry["idx"]
    fault = file_fault(root, name, entry["idx_sha256"])
    if fault:
        return [Problem(name, fault)]
    pairs = zip(rows["id"].tolist(), rows["offset"].tolist(), strict=True)
    if (root / name).read_text() != "".join(f"{number}\t{offset}\n" for number, offset in pairs):
        return [Problem(TABLE, f"damaged: {name}, which is undamaged, lists other offsets")]
    return []


def _check_records(
    root: Path,
    entry: Mapping[str, Any],
    rows: "NDArray[np.void]",
    deep: bool,
    advance: Advance,
    table: Table,
) -> list[Problem]:
    file = entry["file"]
    reader = RecordReader(rows, entry["bytes"], advance)
    try:
        with (root / file).open("rb", buffering=0) as stream:
            seen = reader.read(stream, images=deep, decode=deep)
            if seen.sha256 != entry["sha256"] and not deep:
                stream.seek(0)
                seen = reader.read(stream, images=True, decode=False)._replace(sha256=seen.sha256)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        return [Problem(file, error.strerror or str(error))]
    if seen.sha256 != entry["sha256"]:
        # Of a file of another length only the beginning was read.
        whole = seen.sha256 if size == entry["bytes"] else sha256_of(root / file)
        owner = _owner(root, whole)
        if owner:
            return [Problem(file, f"holds the content of {owner}")]
    problems = [Problem(file, text) for text in _whole_file(seen, entry, size)]
    named = _Names(table)
    if seen.sha256 == entry["sha256"]:
        return problems + [named.blame_table(file, rows, fault) for fault in seen.faults]
    if seen.size == entry["bytes"] and not seen.faults:
        text = "every record is as the table has it, but the sha256 is not the manifest's"
        problems.append(Problem(file, text))
    return problems + [named.problem(file, rows, fault) for fault in seen.faults]


def _whole_file(seen: ReadResult, entry: Mapping[str, Any], size: int) -> Iterator[str]:
    if seen.error:
        yield f"cannot be read from byte {seen.size} on: {seen.error}"
    elif size < entry["bytes"]:
        yield f"cut short: {size} of {entry['bytes']} bytes"
    elif size > entry["bytes"]:
        yield f"{size - entry['bytes']} bytes too many at its end"


class _Names:
    """Builds problems that name the image and the source of a record."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._classes = table.classes()
        self._sources = table.sources()

    def problem(self, file: str, rows: "NDArray[np.void]", fault: Fault) -> Problem:
        record = self._table.record(int(rows["id"][fault.row]))
        assert record is not None  # the rows are of this table
        return Problem(
            file,
            fault.text,
            record.id,
            image_key(self._classes, record),
            origin_of(self._sources[record.source], record),
            fault.undecodable,
        )

    def blame_table(self, file: str, rows: "NDArray[np.void]", fault: Fault) -> Problem:
        """Return the problem of a record whose file has the right sha256."""
        if fault.undecodable:
            return self.problem(file, rows, fault)
        number = rows["id"][fault.row]
        return Problem(TABLE, f"damaged: its row of record {number} does not fit {file}")
