"""Last phase of packing: completes the table and writes indexes, listings and the manifest."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mpl_fast import __version__
from mpl_fast.atomic import atomic_file, atomic_path, sha256_of, sync_files, write_text
from mpl_fast.data.manifest import CLASSES, FORMAT
from mpl_fast.errors import DataError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.options import ImageOptions, Json, options_from
from mpl_fast.packing.plan.prepare import warn
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import (
    TABLE,
    ShardRow,
    Table,
    create_written,
    edit_table,
    image_key,
    insert_rows,
    open_table,
    origin_of,
    source_entry,
    table_errors,
)
from mpl_fast.packing.publish.duplicates import describe_duplicates, find_duplicates
from mpl_fast.packing.publish.split_files import write_splits
from mpl_fast.packing.write.process_image import describe_processing
from mpl_fast.packing.write.shard_receipt import COLUMNS, ShardReceipt, receipt_path

_BLOCK = 1 << 14  # rows in memory at a time


def unfinished_shards(work: Path, shards: Iterable[ShardRow]) -> list[str]:
    """Return the files of shards that are missing or of another plan; only sizes are compared."""
    return [shard.file for shard in shards if not _is_finished(work, shard)]


def _is_finished(work: Path, shard: ShardRow) -> bool:
    try:
        size = (work / shard.file).stat().st_size
        receipt = _receipt(work, shard)
    except (FileNotFoundError, DataError):  # missing or damaged: the shard is packed again
        return False
    return (receipt.content, receipt.stamps, receipt.size) == (shard.content, shard.stamps, size)


def _receipt(work: Path, shard: ShardRow) -> ShardReceipt:
    return ShardReceipt.load(receipt_path(work, shard.file))


def finish(work: Path) -> Json:
    """Write all files of the pack except shards and manifest into work; return the manifest.

    Its duration is still empty. Raises DataError when a shard of the plan is missing.
    """
    with open_table(work / TABLE) as table:
        missing = unfinished_shards(work, table.shards())
    if missing:
        raise DataError(
            f"{work.parent}: "
            f"{counted(len(missing), 'shard of the plan is', 'shards of the plan are')} not there: "
            f"{first_few(missing)}; pack them (every part), then finish"
        )
    # The table is replaced last: if stopped before, finishing the plan again gives the same bytes.
    with atomic_path(work / TABLE) as completed:
        _complete_table(work, completed)
        with open_table(completed) as table:
            manifest = _manifest(work, table)
            warn([describe_left_out(table, manifest), describe_duplicates(manifest["duplicates"])])
        return manifest | {"table_sha256": sha256_of(completed)}


def _complete_table(work: Path, target: Path) -> None:
    """Write the table with the position of every record to target."""
    shutil.copyfile(work / TABLE, target)
    with table_errors(target), closing(edit_table(target)) as connection:
        table = Table(connection)
        # An earlier finish may have completed the table before it was stopped: then keep its bytes.
        if not _has_written(table, _written(work, table)):
            create_written(connection)
            connection.execute("BEGIN")
            rows = _written(work, table)
            insert_rows(connection, "written", "(?, ?, ?, ?, ?)", rows)
            # The unpacked copy of an archive is removed when the pack is complete.
            connection.execute("UPDATE sources SET file = spec WHERE file LIKE 'spool-%'")
            connection.execute("COMMIT")


def _written(work: Path, table: Table) -> Iterator[tuple[int, ...]]:
    """Yield id, offset, length, size and crc32 of every record, in order."""
    for shard in table.shards():
        receipt = _receipt(work, shard)
        columns = [getattr(receipt, name) for name in COLUMNS]
        for start in range(0, len(receipt.ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield from zip(*(column[block].tolist() for column in columns), strict=True)


def _has_written(table: Table, rows: Iterator[tuple[int, ...]]) -> bool:
    """Return whether the table is completed already, with exactly these rows."""
    if not list(table.query("SELECT 1 FROM sqlite_master WHERE name = 'written'")):
        return False
    stored = table.query("SELECT * FROM written ORDER BY id")
    return all(old == new for old, new in zip_longest(stored, rows))


def _manifest(work: Path, table: Table) -> Json:
    options, classes = table.options(), table.classes()
    shards, bad, totals = _shards(work, table)
    skipped = [remark["source"] for remark in bad if remark["action"] == "skipped"]
    if skipped and options["on_bad"] == "fail":
        raise DataError(
            f"{work.parent}: shards that were packed with --on-bad skip lack "
            f"{counted(len(skipped), 'image')}: {first_few(skipped, between='; ')}; use "
            "--on-bad skip, or repair them"
        )
    return {
        "format": FORMAT,
        "tool": f"mpl_fast {__version__}",
        "created": datetime.now(timezone.utc).isoformat(),
        "plan_sha256": plan_digest(table),
        "layout": options["layout"],
        "options": options,
        "sources": _sources(table),
        "classes": {
            "n": len(classes),
            "file": CLASSES,
            "sha256": write_text(work / CLASSES, "".join(f"{name}\n" for name in classes)),
            **({"titles": titles} if (titles := table.titles()) else {}),
        },
        "transform": describe_processing(options_from(ImageOptions, options)),
        "shards": shards,
        "splits": write_splits(work, table, shards),
        "table": TABLE,
        "duplicates": find_duplicates(table),
        "totals": totals,
        "bad": bad,
    }


def _sources(table: Table) -> list[Json]:
    options = table.options()
    # Labeled images that are in two .rec files are counted once.
    twice = options["layout"] == "separate" and options["unlabeled"] == "all"
    images = "(SELECT DISTINCT source, path, start, size FROM records)" if twice else "records"
    query = f"SELECT source, count(*), sum(size) FROM {images} GROUP BY source"
    totals = {number: (count, size) for number, count, size in table.query(query)}
    entries = []
    for source in table.sources():
        count, size = totals.get(source.number, (0, 0))
        entries.append({**source_entry(source, options), "images": count, "bytes": size})
    return entries


def _shards(work: Path, table: Table) -> tuple[list[Json], list[Json], Json]:
    """Return the manifest's entries of all shards, of skipped and converted images, and totals."""
    rows, classes, sources = table.shards(), table.classes(), table.sources()
    counts = Counter(shard.prefix for shard in rows)
    entries, bad = [], []
    totals: Counter[str] = Counter()
    for shard in rows:
        receipt = _receipt(work, shard)
        entry: Json = {
            "file": shard.file,
            "prefix": shard.prefix,
            "bytes": receipt.size,
            "records": len(receipt.ids),
            "crc32": receipt.checksum,
            "multipart": receipt.multipart,
            "first_id": shard.first_id,
        }
        if counts[shard.prefix] > 1:  # else the split's index is the shard's own
            entry["idx"] = f"{Path(shard.file).stem}.idx"
            entry["idx_sha256"] = _write_index(work / entry["idx"], receipt)
        entries.append(entry)
        totals["images"] += len(receipt.ids)
        totals["bytes_in"] += receipt.bytes_in
        totals["bytes_out"] += receipt.size
        totals["reencoded"] += receipt.reencoded
        totals["orientation_dropped"] += receipt.rotated
        for remark in receipt.remarks:
            record = table.record(remark.id)
            assert record is not None, remark
            bad.append(
                {
                    "image": image_key(classes, record),
                    "source": origin_of(sources[record.source], record),
                    "reason": remark.reason,
                    "action": remark.action,
                }
            )
    sync_files([work / entry["idx"] for entry in entries if "idx" in entry])
    return entries, bad, {**totals, "seconds": 0.0}


def _write_index(path: Path, receipt: ShardReceipt) -> str:
    with atomic_file(path, sync=False) as file:
        entries = zip(receipt.ids.tolist(), receipt.offsets.tolist(), strict=True)
        file.write(b"".join(map(b"%d\t%d\n".__mod__, entries)))
    return file.sha256


def describe_left_out(table: Table, manifest: Mapping[str, Any]) -> str:
    """Return a warning when labeled images were left out as bad; "" when none was."""
    labeled = manifest["splits"]["labeled"]
    if manifest["layout"] == "separate":
        drawn = sum(shard.records for shard in table.shards() if shard.prefix == "train_label")
    else:
        ((drawn,),) = table.query("SELECT count(*) FROM records WHERE labeled")
    if labeled["records"] == drawn:
        return ""
    query = (
        "SELECT label FROM records LEFT JOIN written ON written.id = records.id WHERE labeled "
        "GROUP BY label HAVING count(written.id) = 0"
    )
    classes = table.classes()
    empty = [classes[label] for (label,) in table.query(query)]
    what = counted(len(empty), "class has", "classes have")
    none = f"; {what} none now ({first_few(empty)}): draw more, or repair them" if empty else ""
    return f"labeled images left out as bad: {drawn - labeled['records']} of {drawn}{none}"
