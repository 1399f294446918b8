"""A finished pack whose records, shards and labeled images are chosen one by one."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpl_fast.packing.options import ImageOptions, PackOptions, SplitOptions
from mpl_fast.packing.pack import publish_pack
from mpl_fast.packing.plan.sharding import shard_file
from mpl_fast.packing.plan.table import TABLE, RecordRow, create_table, open_table
from mpl_fast.packing.publish.out_folder import open_out_folder
from tests.packing.packs import CLASSES, jpeg, make_tree, with_magic, write_shards

HOW = ImageOptions(check="none", on_bad="skip")


class Record(NamedTuple):
    """One record as it was put in."""

    id: int
    label: int
    name: str
    image: bytes
    file: str
    offset: int  # in that file
    start: int  # of that file in the joined files of its prefix

    @property
    def key(self) -> str:
        return f"{CLASSES[self.label]}/{self.name}"


@dataclass(frozen=True)
class SmallPack:
    """A finished pack, its source folder, and what it holds."""

    root: Path
    source: Path
    records: Mapping[int, Record]


def make_pack(
    root: Path,
    *,
    shards: Mapping[str, Sequence[int]],
    labeled: Collection[int] = (0,),
    skipped: Collection[int] = (),
    images: Mapping[int, bytes] | None = None,
    layout: str = "shared",
) -> SmallPack:
    """Pack into root: shards says how many planned records each file of a prefix has.

    The record with id 1 has several parts. images replaces the content of records; the ids in
    skipped are planned, but not written.
    """
    source = root.with_name(f"{root.name}-source")
    contents, rows = {}, []
    prefixes = [prefix for prefix, counts in shards.items() for _ in range(sum(counts))]
    for number, prefix in enumerate(prefixes):
        content = with_magic(jpeg(number)) if number == 1 else jpeg(number)
        contents[number] = b"" if number in skipped else (images or {}).get(number, content)
        label, name = number % len(CLASSES), f"{prefix}_{number}.jpg"
        path = f"{CLASSES[label]}/{name}"
        stat = (make_tree(source, {path: contents[number]}) / path).stat()
        place = (0, path, -1, stat.st_size, stat.st_mtime_ns)
        rows.append(RecordRow(number, label, number in labeled, name, *place))
    with open_out_folder(root) as folder:
        _write_plan(folder.work / TABLE, source, layout, shards, rows)
        write_shards(folder.work, HOW)
        publish_pack(folder, 0.0)
    (root / ".lock").unlink()
    return SmallPack(root, source, _records(root, contents))


def _write_plan(
    path: Path,
    source: Path,
    layout: str,
    shards: Mapping[str, Sequence[int]],
    rows: Sequence[RecordRow],
) -> None:
    split = SplitOptions(layout=layout)
    options = PackOptions(src=(str(source),), out=path.parent, split=split, image=HOW).planned()
    table = create_table(path)
    table.execute("INSERT INTO plan VALUES (?)", (json.dumps(options),))
    table.executemany("INSERT INTO classes VALUES (?, ?)", enumerate(CLASSES))
    table.execute("INSERT INTO sources VALUES (0, ?, 'folder', ?, 0, 0)", (str(source),) * 2)
    table.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    first = number = 0
    for prefix, counts in shards.items():
        for at, count in enumerate(counts):
            size = sum(row.size for row in rows[first : first + count])
            shard = (number, prefix, shard_file(prefix, at, len(counts)), first, count, size)
            table.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, 'c', 's')", shard)
            first, number = first + count, number + 1
    table.close()


def _records(root: Path, contents: Mapping[int, bytes]) -> dict[int, Record]:
    found = {}
    starts = dict.fromkeys(("train", "train_label", "train_unlabel", "val"), 0)
    with open_table(root / TABLE) as table:
        for shard in table.shards():
            for record, written in table.written(shard.ids):
                place = (shard.file, written.offset, starts[shard.prefix])
                image = contents[record.id]
                found[record.id] = Record(record.id, record.label, record.name, image, *place)
            starts[shard.prefix] += (root / shard.file).stat().st_size
    return found
