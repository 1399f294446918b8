"""What a pack would do, told without doing it."""

import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from mpl_fast.packing.options import PackOptions
from mpl_fast.packing.pack import check_options, plan_to
from mpl_fast.packing.plan.make_plan import RECORD_BYTES, TABLE_BYTES, Split, splits
from mpl_fast.packing.plan.table import Table, reading
from mpl_fast.packing.write.process_image import treat
from mpl_fast.packing.write.reader import Reader

Json = dict[str, Any]
_SAMPLE_SECONDS = 1.5
_SAMPLE_IMAGES = 500


def dry_run(options: PackOptions) -> Json:
    """Return the plan as counts, bytes, shards, splits and time; nothing is written to --out.

    The time is that of a sample of the images, read, checked and perhaps re-encoded here, over
    all processes: writing is not in it, so the disk may make it longer.
    """
    check_options(options)
    with tempfile.TemporaryDirectory(prefix="make_rec-") as folder:
        path = Path(folder, "plan")
        plan_to(path, options)
        with reading(path) as table:
            return _told(table, options)


def _told(table: Table, options: PackOptions) -> Json:
    shards = table.shards()
    images = sum(shard.records for shard in shards)
    size = sum(shard.bytes for shard in shards)
    how = options.split
    listed = splits(how.layout, how.unlabeled, val=options.val is not None)
    return {
        "out": str(options.out),
        "layout": how.layout,
        "classes": len(table.classes()),
        "images": images,
        "bytes_in": size,
        "bytes_out_at_most": size + (RECORD_BYTES + TABLE_BYTES) * images,
        "shards": [
            {"file": shard.file, "records": shard.records, "bytes": shard.bytes} for shard in shards
        ],
        "splits": {split.name: _split(table, split) for split in listed},
        "seconds_at_least": round(images * _seconds_an_image(table, options) / _jobs(options), 1),
    }


def _split(table: Table, split: Split) -> Json:
    counts: Counter[int] = Counter()
    for shard in table.shards():
        if shard.prefix == split.prefix:
            counts.update(record.label for record in table.records(shard) if split.lists(record))
    per_class = [counts[label] for label in range(len(table.classes()))]
    return {
        "records": sum(per_class),
        "per_class_min": min(per_class),
        "per_class_max": max(per_class),
    }


def _jobs(options: PackOptions) -> int:
    return max(1, options.processes)


def _seconds_an_image(table: Table, options: PackOptions) -> float:
    """Return how long one image takes one process, from the first ones of the plan."""
    reader = Reader(table.sources(), table.classes(), 0)
    records = table.records(table.shards()[0])
    start = time.monotonic()
    done = 0
    try:
        for opened in reader.opened(islice(records, _SAMPLE_IMAGES)):
            treat(reader.image(opened), opened.record.name, options.image)
            done += 1
            if time.monotonic() - start > _SAMPLE_SECONDS:
                break
    finally:
        reader.close()
    return (time.monotonic() - start) / max(done, 1)
