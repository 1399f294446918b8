"""Files of a split: its .idx (read by DALI and MXNet) and its .lst (id, label, class/name)."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from mpl_fast.atomic import atomic_file, sync_files
from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits
from mpl_fast.packing.plan.table import ShardRow, Table, blocks, to_utf8
from mpl_fast.packing.publish.sparse_index import Padding, check_index

# RecordRow.labeled and .label; the record's line in a .lst, where an image without a label has its
# path for a name; and that in an .idx.
ListedRecord = tuple[int, int, bytes, bytes]
_ROWS = """
SELECT labeled, label, id, CAST(name AS BLOB), offset + ?
FROM records CROSS JOIN written USING (id) WHERE id BETWEEN ? AND ? ORDER BY id
"""


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
    planned = planned_splits(options["layout"], options["unlabeled"], val=val)
    entries = {}
    for prefix in dict.fromkeys(split.prefix for split in planned):
        own = [row for row in rows if row.prefix == prefix]
        wanted = [s for s in planned if s.prefix == prefix and (names is None or s.name in names)]
        with ExitStack() as stack:
            splits = [_SplitFiles(work, split, stack) for split in wanted]
            for file, records in listed_records(table, own, sizes) if splits else ():
                for split in splits:
                    split.add(file, records)
            for split in splits:
                split.end()
        checked: set[str] = set()  # two splits may list the same
        for split in splits:
            if len(own) > 1 and split.idx.sha256 not in checked:
                with (work / split.index).open(encoding="ascii") as lines:
                    check_index(lines, [sizes[shard.file] for shard in own], split.index)
            checked.add(split.idx.sha256)
            entries[split.planned.name] = split.entry(own, len(table.classes()))
    sync_files([work / entry[kind] for entry in entries.values() for kind in ("idx", "lst")])
    return entries


class _SplitFiles:
    """The files of a split; offsets in its index count over the joined shards."""

    def __init__(self, work: Path, planned: PlannedSplit, stack: ExitStack) -> None:
        self.planned = planned
        self.index, self._listing = f"{planned.stem}.idx", f"{planned.stem}.lst"
        self.idx = stack.enter_context(atomic_file(work / self.index, sync=False))
        self._lst = stack.enter_context(atomic_file(work / self._listing, sync=False))
        self._counts: Counter[int] = Counter()
        self._padding = Padding()

    def add(self, file: int, records: Sequence[ListedRecord]) -> None:
        """Write the lines of those records of a file that are in the split."""
        labeled = self.planned.labeled
        if labeled is not None:
            records = [record for record in records if record[0] == labeled]
        if records:
            _, labels, listed, indexed = zip(*records, strict=True)
            self._counts.update(labels)
            self._lst.write(b"".join(listed))
            self.idx.write(b"".join(self._padding.padded(file, indexed)))

    def end(self) -> None:
        """Write what is behind the last record; DataError when there is none."""
        self.idx.write(self._padding.end())
        if not self._counts:
            raise DataError(
                f"{self.planned.name}: none of its images is left (all were skipped, or "
                "--unlabeled rest), and an index without records cannot be read; repair them, or "
                "choose others"
            )

    def entry(self, shards: Sequence[ShardRow], classes: int) -> Json:
        """Return the manifest's entry of the split, when its files are complete."""
        return {
            "records": self._counts.total(),
            "shards": [shard.file for shard in shards],
            "idx": self.index,
            "idx_sha256": self.idx.sha256,
            "lst": self._listing,
            "lst_sha256": self._lst.sha256,
            **class_counts(self._counts, classes),
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
    table: Table, shards: Sequence[ShardRow], sizes: Mapping[str, int]
) -> Iterator[tuple[int, list[ListedRecord]]]:
    """Yield written records with the number of their file, some at a time, in order."""
    # Images without a class have the label -1: the last of these.
    folders = [*(to_utf8(f"{name}/") for name in table.classes()), b""]
    start = 0
    for number, shard in enumerate(shards):
        for rows in blocks(table.query(_ROWS, (start, *shard.ids))):
            labeled, labels, ids, names, offsets = zip(*rows, strict=True)
            listed = zip(ids, labels, map(folders.__getitem__, labels), names, strict=True)
            indexed = zip(ids, offsets, strict=True)
            lines = map(b"%d\t%d\t%b%b\n".__mod__, listed), map(b"%d\t%d\n".__mod__, indexed)
            yield number, [*zip(labeled, labels, *lines, strict=True)]
        start += sizes[shard.file]
