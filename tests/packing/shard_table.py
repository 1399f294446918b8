"""A table of one shard for tests, made row by row as the planner would."""

from collections.abc import Sequence
from pathlib import Path

from mpl_fast.packing.plan.table import TABLE, RecordRow, SourceRow, create_table

CLASSES = ["ant", "bee", "cat"]
FIRST_ID = 7
SHARD = "train.rec"


def folder(path: Path) -> SourceRow:
    """Plan a folder as source 0."""
    return SourceRow(0, "photos", "folder", str(path), 0, 0)


def one_file(kind: str, path: Path, number: int = 0) -> SourceRow:
    """Plan a file that holds many images."""
    stat = path.stat()
    return SourceRow(number, path.name, kind, str(path), stat.st_size, stat.st_mtime_ns)


def own_file(number: int, path: Path) -> RecordRow:
    """Plan an image in a file of its own in the folder that is source 0."""
    stat = path.stat()
    return RecordRow(
        FIRST_ID + number,
        number % 3,
        1,
        path.name,
        0,
        path.name,
        -1,
        stat.st_size,
        stat.st_mtime_ns,
    )


def files(place: Path, images: Sequence[bytes]) -> tuple[SourceRow, list[RecordRow]]:
    """Write images as files below place, the i-th called i.jpg; return their plan."""
    place.mkdir(exist_ok=True)
    rows = []
    for number, image in enumerate(images):
        path = place / f"{number}.jpg"
        path.write_bytes(image)
        rows.append(own_file(number, path))
    return folder(place), rows


def make_table(work: Path, sources: Sequence[SourceRow], rows: Sequence[RecordRow]) -> None:
    """Write the table of a single shard, number 0, into the new folder work."""
    work.mkdir(exist_ok=True)
    table = create_table(work / TABLE)
    table.execute("BEGIN")
    table.executemany("INSERT INTO classes VALUES(?, ?)", enumerate(CLASSES))
    table.executemany("INSERT INTO sources VALUES(?, ?, ?, ?, ?, ?)", sources)
    shard = (0, "train", SHARD, FIRST_ID, len(rows), sum(row.size for row in rows), "what", "when")
    table.execute("INSERT INTO shards VALUES(?, ?, ?, ?, ?, ?, ?, ?)", shard)
    table.executemany("INSERT INTO records VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    table.execute("COMMIT")
    table.close()
