"""Files of a split: its .idx (read by DALI and MXNet) and its .lst (id, label, class/name)."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mpl_fast.atomic import atomic_file
from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits
from mpl_fast.packing.plan.table import ShardRow, Table, listed_name, to_utf8
from mpl_fast.packing.publish.sparse_index import check_index, padded_lines


def write_splits(
    work: Path, table: Table, shards: Sequence[Json], names: Collection[str] | None = None
) -> Json:
    """Write the .idx and .lst of every split, or of those named, into work.

    shards are the manifest's entries of the .rec files. Returns the manifest's entries of the
    splits by name. Raises DataError when a split has no record, or DALI would read its index wrong.
    """
    options, rows = table.options(), table.shards()
    sizes = {shard["file"]: shard["bytes"] for shard in shards}
    val = any(row.prefix == "val" for row in rows)
    entries = {}
    for split in planned_splits(options["layout"], options["unlabeled"], val=val):
        if names is None or split.name in names:
            own = [row for row in rows if row.prefix == split.prefix]
            entries[split.name] = _write_split(work, table, split, own, sizes)
    return entries


def _write_split(
    work: Path,
    table: Table,
    split: PlannedSplit,
    shards: Sequence[ShardRow],
    sizes: Mapping[str, int],
) -> Json:
    """Write the files of a split; offsets in its index count over the joined shards."""
    classes = table.classes()
    counts: Counter[int] = Counter()
    index, listing = f"{split.stem}.idx", f"{split.stem}.lst"
    with atomic_file(work / index) as idx, atomic_file(work / listing) as lst:

        def entries() -> Iterator[tuple[int, int, int]]:
            for record_id, label, name, file, offset in listed_records(
                table, shards, sizes, split.labeled
            ):
                counts[label] += 1
                shown = listed_name(classes, label, name)
                lst.write(to_utf8(f"{record_id}\t{label}\t{shown}\n"))
                yield record_id, file, offset

        for line in padded_lines(entries()):
            idx.write(line.encode())
    if not counts:
        raise DataError(
            f"{split.name}: none of its images is left (all were skipped, or --unlabeled rest), "
            "and an index without records cannot be read; repair them, or choose others"
        )
    if len(shards) > 1:
        with (work / index).open(encoding="ascii") as lines:
            check_index(lines, [sizes[shard.file] for shard in shards], index)
    return {
        "records": counts.total(),
        "shards": [shard.file for shard in shards],
        "idx": index,
        "idx_sha256": idx.sha256,
        "lst": listing,
        "lst_sha256": lst.sha256,
        **class_counts(counts, len(classes)),
    }


def class_counts(counts: Counter[int], classes: int) -> Json:
    """Return how many records of a split each class has, from the number of each label.

    `with_label`: how many records have a label; absent if all have.
    """
    without = counts[NO_LABEL]
    per_class = [counts[label] for label in range(classes)]
    return {
        "per_class_min": min(per_class),
        "per_class_max": max(per_class),
        **({"with_label": counts.total() - without} if without else {}),
    }


def listed_records(
    table: Table, shards: Sequence[ShardRow], sizes: Mapping[str, int], labeled: int | None
) -> Iterator[tuple[int, int, str, int, int]]:
    """Yield (id, label, name, file number, offset over the joined files) of written records."""
    which = "" if labeled is None else f"AND labeled = {labeled} "
    # Only these columns: whole rows take longer.
    query = (
        "SELECT id, label, name, offset FROM records CROSS JOIN written USING (id) "
        f"WHERE id BETWEEN ? AND ? {which}ORDER BY id"
    )
    start = 0
    for number, shard in enumerate(shards):
        for record_id, label, name, offset in table.query(query, shard.ids):
            yield record_id, label, name, number, start + offset
        start += sizes[shard.file]
