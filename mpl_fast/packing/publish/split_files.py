"""The files by which a split is read: its .idx for DALI and MXNet, and its .lst for people."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpl_fast.packing.plan.table import ShardRow, Table
from mpl_fast.packing.publish.sparse_index import check_index, padded

Json = dict[str, Any]
_TOGETHER = 4096  # lines that are encoded, hashed and written at once


class TextFile:
    """A text file that is hashed as it is written and gets its name when it is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()
        self._lines: list[str] = []

    def write(self, line: str) -> None:
        """Add a line, which ends with its line break."""
        self._lines.append(line)
        if len(self._lines) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        content = "".join(self._lines).encode("utf-8", "surrogateescape")
        self._lines.clear()
        self._digest.update(content)
        self._file.write(content)

    def close(self, *, complete: bool) -> None:
        """Give the file its name, or remove it when it is not complete."""
        if complete:
            self._flush()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if complete:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()

    @property
    def sha256(self) -> str:
        """Return the sha256 of what was written."""
        return self._digest.hexdigest()


@contextmanager
def text_file(path: Path) -> Iterator[TextFile]:
    """Open a TextFile: after an error no file is left."""
    file = TextFile(path)
    complete = False
    try:
        yield file
        complete = True
    finally:
        file.close(complete=complete)


def write_text(path: Path, text: str) -> str:
    """Write text to path, on disk, then named; return its sha256."""
    with text_file(path) as file:
        file.write(text)
    return file.sha256


def write_split(
    work: Path,
    table: Table,
    stem: str,
    shards: Sequence[ShardRow],
    sizes: Mapping[str, int],
    labeled: int | None,
) -> Json:
    """Write work/stem.idx and .lst of the records of shards; return the manifest's entry.

    labeled picks those with this RecordRow.labeled, None all. sizes are the bytes of the .rec
    files, by name. The index counts offsets over them as joined. Raises DataError when DALI would
    not read the index right.
    """
    classes = table.classes()
    counts: Counter[int] = Counter()
    index, listing = f"{stem}.idx", f"{stem}.lst"
    with text_file(work / index) as idx, text_file(work / listing) as lst:

        def entries() -> Iterator[tuple[int, int, int]]:
            start = 0
            for number, shard in enumerate(shards):
                for record_id, label, name, offset in _listed(table, shard, labeled):
                    counts[label] += 1
                    lst.write(f"{record_id}\t{label}\t{classes[label]}/{name}\n")
                    yield record_id, number, start + offset
                start += sizes[shard.file]

        for line in padded(entries()):
            idx.write(line)
    if len(shards) > 1:
        with (work / index).open(encoding="ascii") as lines:
            check_index(lines, [sizes[shard.file] for shard in shards], index)
    return {
        "records": sum(counts.values()),
        "shards": [shard.file for shard in shards],
        "idx": index,
        "idx_sha256": idx.sha256,
        "lst": listing,
        "lst_sha256": lst.sha256,
        "per_class_min": min(counts[label] for label in range(len(classes))),
        "per_class_max": max(counts.values(), default=0),
    }


def _listed(
    table: Table, shard: ShardRow, labeled: int | None
) -> Iterator[tuple[int, int, str, int]]:
    """Yield (id, label, name, offset) of written records; whole rows would take longer."""
    which = "" if labeled is None else f"AND labeled = {labeled} "
    query = (
        "SELECT id, label, name, offset FROM records CROSS JOIN written USING (id) "
        f"WHERE id BETWEEN ? AND ? {which}ORDER BY id"
    )
    yield from table.query(query, (shard.first_id, shard.first_id + shard.records - 1))
