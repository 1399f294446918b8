"""Files of a split: its .idx (read by DALI and MXNet) and its .lst (id, label, class/name)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mpl_fast.atomic import atomic_file
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import ShardRow, Table, to_utf8
from mpl_fast.packing.publish.sparse_index import check_index, padded_lines


def write_split(
    work: Path,
    table: Table,
    stem: str,
    shards: Sequence[ShardRow],
    sizes: Mapping[str, int],
    labeled: int | None,
) -> Json:
    """Write work/stem.idx and work/stem.lst for the records of shards; return the manifest entry.

    labeled selects the records with this RecordRow.labeled, None all of them. sizes are the bytes
    of the .rec files by name; offsets in the index count over these files joined. Raises DataError
    when DALI would read the index wrong.
    """
    classes = table.classes()
    counts: Counter[int] = Counter()
    index, listing = f"{stem}.idx", f"{stem}.lst"
    with atomic_file(work / index) as idx, atomic_file(work / listing) as lst:

        def entries() -> Iterator[tuple[int, int, int]]:
            for record_id, label, name, file, offset in listed_records(
                table, shards, sizes, labeled
            ):
                counts[label] += 1
                lst.write(to_utf8(f"{record_id}\t{label}\t{classes[label]}/{name}\n"))
                yield record_id, file, offset

        for line in padded_lines(entries()):
            idx.write(line.encode())
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
