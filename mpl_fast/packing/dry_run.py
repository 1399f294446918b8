"""The --dry-run of pack: its plan, and an estimate of its time from a sample of the images."""

import tempfile
import time
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

from mpl_fast.packing.options import Json, PackOptions
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits
from mpl_fast.packing.plan.make_plan import RECORD_BYTES, TABLE_BYTES
from mpl_fast.packing.plan.prepare import check_options, plan_to
from mpl_fast.packing.plan.table import Table, open_table
from mpl_fast.packing.publish.split_files import class_counts
from mpl_fast.packing.write.process_image import process_image
from mpl_fast.packing.write.reader import Reader

_SAMPLE_SECONDS = 1.5
_SAMPLE_IMAGES = 500


def dry_run(options: PackOptions) -> Json:
    """Return counts, bytes, shards, splits and time of the plan; nothing is written to --out.

    The time is measured on a sample of the images, which are read, checked and perhaps re-encoded,
    and divided by the number of processes. It includes neither writing nor unpacking.
    """
    check_options(options)
    how = options.split
    # Compressed archives are unpacked into this folder, too.
    with tempfile.TemporaryDirectory(prefix="make_rec-") as folder:
        path = Path(folder, "plan")
        plan_to(path, options)
        with open_table(path) as table:
            shards = table.shards()
            splits = planned_splits(how.layout, how.unlabeled, val=options.val is not None)
            images = sum(shard.records for shard in shards)
            size = sum(shard.bytes for shard in shards)
            seconds = images * _seconds_per_image(table, options) / options.processes
            return {
                "out": str(options.out),
                "layout": how.layout,
                "classes": len(table.classes()),
                "images": images,
                "bytes_in": size,
                "bytes_out_at_most": size + (RECORD_BYTES + TABLE_BYTES) * images,
                "shards": [
                    {"file": shard.file, "records": shard.records, "bytes": shard.bytes}
                    for shard in shards
                ],
                "splits": {split.name: _split(table, split) for split in splits},
                "seconds_at_least": round(seconds, 1),
                "unpacked": [s.spec for s in table.sources() if Path(s.file).parent == path.parent],
            }


def _split(table: Table, split: PlannedSplit) -> Json:
    counts: Counter[int] = Counter()
    for shard in table.shards():
        if shard.prefix == split.prefix:
            counts.update(record.label for record in table.records(shard) if split.lists(record))
    return {"records": counts.total(), **class_counts(counts, len(table.classes()))}


def _seconds_per_image(table: Table, options: PackOptions) -> float:
    """Return the time of one image in one process, measured on the first images of the plan."""
    records = islice(table.records(table.shards()[0]), _SAMPLE_IMAGES)
    start = time.monotonic()
    done = 0
    with closing(Reader(table.sources(), table.classes(), 0)) as reader:
        for opened in reader.opened(records):
            process_image(reader.image(opened), opened.record.name, options.image)
            done += 1
            if time.monotonic() - start > _SAMPLE_SECONDS:
                break
    return (time.monotonic() - start) / done
