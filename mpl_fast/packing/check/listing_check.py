"""Compares the table and the splits' .idx and .lst files with their checksums and each other."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import MANIFEST, load_manifest
from mpl_fast.packing.check.shard_check import CHANGED, Problem, file_fault
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits
from mpl_fast.packing.plan.table import TABLE, ShardRow, Table, open_table
from mpl_fast.packing.publish.sparse_index import Padding
from mpl_fast.packing.publish.split_files import listed_records
from mpl_fast.packing.write.pool import Advance

_SIZES = """
SELECT file, count(*), max(offset + length) FROM shards
JOIN written ON written.id BETWEEN first_id AND first_id + records - 1 GROUP BY file
"""


def check_table(
    root: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, ShardRow], list[Problem]]:
    """Compare the table with its checksum, and what training uses of the manifest with the table.

    Return the shards in the table by file name, none if it is damaged, and the problems.
    """
    fault = file_fault(root, TABLE, "sha256", manifest["table_sha256"])
    if fault:
        return {}, [Problem(TABLE, fault)]
    with open_table(root / TABLE) as table:
        shards = {shard.file: shard for shard in table.shards()}
        right = (
            (len(table.classes()), table.titles()),
            {file: sizes for file, *sizes in table.query(_SIZES)},
            {split.name: [shard.file for shard in own] for split, own in splits_with_shards(table)},
        )
    stored = (
        (manifest["classes"]["n"], manifest["classes"].get("titles", [])),
        {entry["file"]: [entry["records"], entry["bytes"]] for entry in manifest["shards"]},
        {name: split["shards"] for name, split in manifest["splits"].items()},
    )
    names = ("classes", "shards", "splits")
    wrong = [name for name, old, new in zip(names, stored, right, strict=True) if old != new]
    text = f"its {' and '.join(wrong)} are not those of {TABLE}; pack again"
    return shards, [Problem(MANIFEST, text)] if wrong else []


def check_split(root: Path, name: str, use_table: bool, advance: Advance) -> list[Problem]:
    """Return the problems of the .lst and .idx of a split, with their first wrong line.

    Without the table only their checksums are compared.
    """
    manifest = load_manifest(root)
    split = manifest["splits"][name]
    problems = []
    for kind in ("lst", "idx"):
        fault = file_fault(root, split[kind], "sha256", split[f"{kind}_sha256"])
        if fault.endswith(CHANGED) and use_table:
            with open_table(root / TABLE) as table:
                right = _right_lines(table, manifest, name, kind)
                fault += _first_wrong_line(root / split[kind], right, advance)
        if fault:
            problems.append(Problem(split[kind], fault))
    return problems


def splits_with_shards(table: Table) -> list[tuple[PlannedSplit, list[ShardRow]]]:
    """Return the splits of the pack in a table, with their shards."""
    options, rows = table.options(), table.shards()
    planned = planned_splits(options["layout"], options["unlabeled"], val=True)
    found = [(split, [row for row in rows if row.prefix == split.prefix]) for split in planned]
    return [(split, own) for split, own in found if own]


def _right_lines(
    table: Table, manifest: Mapping[str, Any], name: str, kind: str
) -> Iterator[bytes]:
    ((planned, shards),) = [found for found in splits_with_shards(table) if found[0].name == name]
    sizes = {entry["file"]: entry["bytes"] for entry in manifest["shards"]}
    padding = Padding()
    for file, records in listed_records(table, shards, sizes):
        for labeled, _, listed, indexed in records:
            if planned.labeled in (None, labeled):
                yield from (listed,) if kind == "lst" else padding.padded(file, (indexed,))
    if last := padding.end():
        yield last


def _first_wrong_line(path: Path, right: Iterable[bytes], advance: Advance) -> str:
    with path.open("rb") as lines:
        for number, pair in enumerate(zip_longest(lines, right, fillvalue=b""), 1):
            advance(0, 0)
            if pair[0] != pair[1]:
                line, wanted = (one.decode("utf-8", "surrogateescape").rstrip() for one in pair)
                return f": line {number} is {line!r}, it should be {wanted!r}"
    return ""
