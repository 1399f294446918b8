"""The end of a pack: indexes, listings and class names beside the shards, and the manifest."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mpl_fast import __version__
from mpl_fast.data.manifest import CLASSES, FORMAT
from mpl_fast.data.records import index_text, listing_text
from mpl_fast.packing.out_folder import OutFolder
from mpl_fast.packing.plan import Plan, SplitPlan
from mpl_fast.packing.shard import ShardResult

Json = dict[str, Any]


def finish(folder: OutFolder, plan: Plan, results: Sequence[ShardResult], options: Json) -> Json:
    """Write the indexes, listings and class names; return the manifest."""
    classes = "".join(f"{name}\n" for name in plan.classes)
    remaining = iter(results)
    splits = {
        split.name: _finish_split(folder, split, [next(remaining) for _ in split.shards], plan)
        for split in plan.splits
    }
    return {
        "format": FORMAT,
        "tool": f"mpl_fast {__version__}",
        "created": "",
        "plan_sha256": plan.digest(),
        "options": options,
        "classes": {"n": len(plan.classes), "sha256": folder.write_text(CLASSES, classes)},
        "splits": splits,
        "totals": {
            "images": sum(split["records"] for split in splits.values()),
            "bytes_in": sum(result.bytes_in for result in results),
            "bytes_out": sum(result.size for result in results),
            "seconds": 0.0,
        },
    }


def _finish_split(
    folder: OutFolder, split: SplitPlan, results: Sequence[ShardResult], plan: Plan
) -> Json:
    offsets: list[int] = []
    shards = []
    start = 0
    for shard, result in zip(split.shards, results, strict=True):
        entry: Json = {
            "file": shard.file,
            "bytes": result.size,
            "records": len(result.offsets),
            "sha256": result.sha256,
            "multipart": result.multipart,
        }
        offsets += (start + offset for offset in result.offsets)
        start += result.size
        if shard.file != f"{split.prefix}.rec":
            entry["idx"] = shard.file.removesuffix("rec") + "idx"
            local = index_text(shard.first_id, result.offsets)
            entry["idx_sha256"] = folder.write_text(entry["idx"], local)
        shards.append(entry)
    rows = split.rows
    counts = Counter(label for label, _ in rows)
    per_class = [counts[label] for label in range(len(plan.classes))]
    index, listing = f"{split.prefix}.idx", f"{split.prefix}.lst"
    return {
        "records": len(rows),
        "prefix": split.prefix,
        "idx": index,
        "idx_sha256": folder.write_text(index, index_text(split.first_id, offsets)),
        "lst": listing,
        "lst_sha256": folder.write_text(listing, listing_text(split.first_id, rows)),
        "per_class_min": min(per_class),
        "per_class_max": max(per_class),
        "shards": shards,
    }
