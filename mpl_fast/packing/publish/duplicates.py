"""Images that a pack contains more than once, found by size and CRC-32 of the packed image."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from mpl_fast.packing.first_few import counted
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import RecordRow, Table, image_key

_EXAMPLES = 10  # groups that the manifest names, and names of each


def find_duplicates(table: Table) -> Json:
    """Return the numbers of groups and images, and examples, as the manifest stores them.

    One image that the layout writes into two .rec files is no duplicate.
    """
    classes = table.classes()
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
                named = {f"{image_key(classes, record)} ({prefix})" for record, prefix in group}
                examples.append(sorted(named)[:_EXAMPLES])
    return {"groups": groups, "images": images, "across_splits": across, "examples": examples}


def describe_duplicates(found: Mapping[str, Any]) -> str:
    """Return a warning about duplicates; "" when there are none."""
    if not found["groups"]:
        return ""
    across = found["across_splits"]
    shown = "; ".join(" = ".join(group[:3]) for group in found["examples"][:3])
    return (
        f"{found['images']} images are there more than once, in {counted(found['groups'], 'group')}"
        f"{f', {across} of them in training and validation both' if across else ''}: {shown}"
    )


def _equal_images(table: Table) -> Iterator[list[tuple[RecordRow, str]]]:
    """Yield groups of records, with their prefix, whose images have one size and checksum."""
    query = (
        "SELECT written.size, crc32, shards.prefix, records.* FROM written "
        "JOIN (SELECT size, crc32 FROM written GROUP BY 1, 2 HAVING count(*) > 1) "
        "USING (size, crc32) JOIN records USING (id) JOIN shards ON records.id "
        "BETWEEN first_id AND first_id + shards.records - 1 ORDER BY 1, 2, records.id"
    )
    for _, group in groupby(table.query(query), lambda row: row[:2]):
        yield [(RecordRow(*record), prefix) for _, _, prefix, *record in group]
