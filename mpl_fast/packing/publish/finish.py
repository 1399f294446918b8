"""The end of a pack: the table is completed, and indexes, listings and the manifest are written."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mpl_fast import __version__
from mpl_fast.atomic import sha256_of
from mpl_fast.data.manifest import CLASSES, FORMAT
from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.make_plan import splits
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import (
    TABLE,
    RecordRow,
    ShardRow,
    Table,
    edit_table,
    key,
    place,
    reading,
    start_written,
    table_errors,
)
from mpl_fast.packing.publish.split_files import text_file, write_split, write_text
from mpl_fast.packing.write.process_image import describe
from mpl_fast.packing.write.shard_receipt import ShardReceipt, sync_file

Json = dict[str, Any]
_BLOCK = 1 << 14  # rows in memory at a time
_EXAMPLES = 10  # groups of duplicates that the manifest names, and names of each


def unfinished(work: Path, shards: Iterable[ShardRow]) -> list[str]:
    """Return the shards that are not there as they were planned; only sizes are looked at."""
    missing = []
    for shard in shards:
        file = work / shard.file
        done_path = work / f"{shard.file}.done"
        if not (done_path.exists() and file.exists() and _as_planned(shard, file, done_path)):
            missing.append(shard.file)
    return missing


def _as_planned(shard: ShardRow, file: Path, done_path: Path) -> bool:
    try:
        done = ShardReceipt.load(done_path)
    except DataError:  # damaged: the shard is packed again
        return False
    planned = (done.content, done.stamps) == (shard.content, shard.stamps)
    return planned and file.stat().st_size == done.size


def finish(work: Path, image_options: ImageOptions) -> Json:
    """Write all files of the pack but shards and manifest into work; return the manifest.

    Its time of creation and duration are still empty. Every shard of the plan has to be there,
    else DataError.
    """
    with reading(work / TABLE) as table:
        missing = unfinished(work, table.shards())
        if missing:
            raise DataError(
                f"{work.parent}: {len(missing)} shards of the plan are not there: "
                f"{first_few(missing)}; pack them (every part), then finish"
            )
    completed = work / f"{TABLE}.tmp"
    bad = _complete_table(work, completed)
    skipped = [remark["source"] for remark in bad if remark["action"] == "skipped"]
    if skipped and image_options.on_bad == "fail":
        raise DataError(
            f"{work.parent}: shards that were packed with --on-bad skip lack {len(skipped)} "
            f"images: {first_few(skipped, between='; ')}; pack with --on-bad skip, or mend them"
        )
    with reading(completed) as table:
        manifest = _manifest(work, table, image_options) | {"bad": bad}
    manifest["table_sha256"] = sha256_of(completed)
    # Last: cut short before, the plan is still as it was, and finishing it gives the same bytes.
    completed.replace(work / TABLE)
    return manifest


def _complete_table(work: Path, target: Path) -> list[Json]:
    """Write the table with the place of every record to target; return remarks about images."""
    shutil.copyfile(work / TABLE, target)
    bad: list[Json] = []
    with table_errors(target), closing(edit_table(target)) as connection:
        table = Table(connection)
        classes, sources = table.classes(), table.sources()
        # A finish that was cut short may have completed the table: then its bytes stay.
        if not _holds(table, _written(work, table)):
            start_written(connection)
            connection.execute("BEGIN")
            rows = _written(work, table)
            connection.executemany("INSERT INTO written VALUES (?, ?, ?, ?, ?)", rows)
            # An unpacked archive is gone when the pack is whole.
            connection.execute("UPDATE sources SET file = spec WHERE file LIKE 'spool-%'")
            connection.execute("COMMIT")
        for shard in table.shards():
            for remark in ShardReceipt.load(work / f"{shard.file}.done").remarks:
                record = table.record(remark.id)
                assert record is not None, remark
                bad.append(
                    {
                        "image": key(classes, record),
                        "source": place(sources[record.source], record),
                        "reason": remark.reason,
                        "action": remark.action,
                    }
                )
    sync_file(target)
    return bad


def _written(work: Path, table: Table) -> Iterator[tuple[int, ...]]:
    """Yield id, offset, length, size and crc32 of every record, in order."""
    for shard in table.shards():
        done = ShardReceipt.load(work / f"{shard.file}.done")
        for start in range(0, len(done.ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield from zip(*(getattr(done, name)[block].tolist() for name in _COLUMNS), strict=True)


def _holds(table: Table, rows: Iterator[tuple[int, ...]]) -> bool:
    """Tell whether the table is completed, with just these rows."""
    if not list(table.query("SELECT 1 FROM sqlite_master WHERE name = 'written'")):
        return False
    stored = table.query("SELECT * FROM written ORDER BY id")
    return all(old == new for old, new in zip_longest(stored, rows))


_COLUMNS = ("ids", "offsets", "lengths", "sizes", "crc32")


def _manifest(work: Path, table: Table, image_options: ImageOptions) -> Json:
    options = table.options()
    classes = table.classes()
    shards, totals = _shards(work, table)
    return {
        "format": FORMAT,
        "tool": f"mpl_fast {__version__}",
        "created": "",
        "plan_sha256": plan_digest(table),
        "layout": options["layout"],
        "options": options,
        "sources": _sources(table),
        "classes": {
            "n": len(classes),
            "file": CLASSES,
            "sha256": write_text(work / CLASSES, "".join(f"{name}\n" for name in classes)),
        },
        "transform": describe(image_options),
        "shards": shards,
        "splits": _splits(work, table, {shard["file"]: shard["bytes"] for shard in shards}),
        "table": TABLE,
        "duplicates": _duplicates(table, classes),
        "totals": totals,
    }


def _splits(work: Path, table: Table, sizes: Mapping[str, int]) -> Json:
    options = table.options()
    rows = table.shards()
    val = any(shard.prefix == "val" for shard in rows)
    written = {}
    for split in splits(options["layout"], options["unlabeled"], val=val):
        own = [shard for shard in rows if shard.prefix == split.prefix]
        entry = write_split(work, table, split.stem, own, sizes, split.labeled)
        if not entry["records"]:
            raise DataError(
                f"{split.name}: all its images are skipped, and an index without records cannot "
                "be read; mend the images, or ask for other labeled ones"
            )
        written[split.name] = entry
    return written


def _sources(table: Table) -> list[Json]:
    options = table.options()
    # Where labeled images lie in two .rec files, they are counted once.
    twice = options["layout"] == "separate" and options["unlabeled"] == "all"
    images = "(SELECT DISTINCT source, path, start, size FROM records)" if twice else "records"
    query = f"SELECT source, count(*), sum(size) FROM {images} GROUP BY source"
    totals = {source: (images, size) for source, images, size in table.query(query)}
    return [
        {
            "spec": source.spec,
            "kind": source.kind,
            "images": totals.get(source.number, (0, 0))[0],
            "bytes": totals.get(source.number, (0, 0))[1],
        }
        for source in table.sources()
    ]


def _shards(work: Path, table: Table) -> tuple[list[Json], Json]:
    """Return the manifest's entries of all shards, and their totals."""
    rows = table.shards()
    counts = Counter(shard.prefix for shard in rows)
    entries = []
    totals: Counter[str] = Counter()
    for shard in rows:
        done = ShardReceipt.load(work / f"{shard.file}.done")
        entry: Json = {
            "file": shard.file,
            "prefix": shard.prefix,
            "bytes": done.size,
            "records": len(done.ids),
            "sha256": done.sha256,
            "multipart": done.multipart,
            "first_id": shard.first_id,
        }
        if counts[shard.prefix] > 1:  # else the split's index is its own
            entry["idx"] = f"{Path(shard.file).stem}.idx"
            entry["idx_sha256"] = _write_index(work / entry["idx"], done)
        entries.append(entry)
        totals["images"] += len(done.ids)
        totals["bytes_in"] += done.bytes_in
        totals["bytes_out"] += done.size
        totals["reencoded"] += done.reencoded
        totals["orientation_dropped"] += done.rotated
    return entries, {**totals, "seconds": 0.0}


def _write_index(path: Path, done: ShardReceipt) -> str:
    with text_file(path) as file:
        for number, offset in zip(done.ids.tolist(), done.offsets.tolist(), strict=True):
            file.write(f"{number}\t{offset}\n")
    return file.sha256


def _duplicates(table: Table, classes: list[str]) -> Json:
    """Return how many images are there more than once, by size and checksum, and some of them.

    One image that the layout writes into two .rec files is no duplicate.
    """
    groups = images = across = 0
    examples: list[list[str]] = []
    for group in _equal_images(table):
        origins = {(record.source, record.path, record.start) for record, _ in group}
        if len(origins) > 1:
            groups += 1
            images += len(origins)
            parts = {prefix.partition("_")[0] for _, prefix in group}
            across += len(parts) > 1
            if len(examples) < _EXAMPLES:
                named = {f"{key(classes, record)} ({prefix})" for record, prefix in group}
                examples.append(sorted(named)[:_EXAMPLES])
    return {"groups": groups, "images": images, "across_splits": across, "examples": examples}


def _equal_images(table: Table) -> Iterator[list[tuple[RecordRow, str]]]:
    """Yield groups of records, with their prefix, whose images have one size and checksum."""
    query = (
        "SELECT written.size, crc32, shards.prefix, records.* FROM written "
        "JOIN (SELECT size, crc32 FROM written GROUP BY 1, 2 HAVING count(*) > 1) "
        "USING (size, crc32) JOIN records USING (id) JOIN shards ON records.id "
        "BETWEEN first_id AND first_id + shards.records - 1 ORDER BY 1, 2, records.id"
    )
    group: list[tuple[RecordRow, str]] = []
    current: tuple[int, int] | None = None
    for size, crc32, prefix, *record in table.query(query):
        if group and current != (size, crc32):
            yield group
            group = []
        current = (size, crc32)
        group.append((RecordRow(*record), prefix))
    if group:
        yield group


def describe_left_out(table: Table, manifest: Mapping[str, Any]) -> str:
    """Return a warning when bad images were among those drawn as labeled; "" when none was."""
    labeled = manifest["splits"]["labeled"]
    if manifest["layout"] == "separate":
        drawn = sum(shard.records for shard in table.shards() if shard.prefix == "train_label")
    else:
        ((drawn,),) = table.query("SELECT count(*) FROM records WHERE labeled")
    if labeled["records"] == drawn:
        return ""
    none = "" if labeled["per_class_min"] else "; a class has none now: draw more, or mend them"
    return f"{drawn - labeled['records']} of the {drawn} labeled images were left out as bad{none}"


def describe_duplicates(found: Mapping[str, Any]) -> str:
    """Return a warning about images that are there more than once; "" when there is none."""
    if not found["groups"]:
        return ""
    across = found["across_splits"]
    shown = "; ".join(" = ".join(group[:3]) for group in found["examples"][:3])
    return (
        f"{found['images']} images are there more than once, in {found['groups']} groups"
        f"{f', {across} of them in training and validation both' if across else ''}: {shown}"
    )
