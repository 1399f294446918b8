"""Images that a pack contains more than once.

They are searched by size and CRC-32 of the packed image, and those that agree are compared: CRC-32
is that of PNG's chunks too, so that of a whole PNG depends on few bits of its content.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from mpl_fast.data.records import HEAD_SIZE, NO_LABEL
from mpl_fast.packing.first_few import counted
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import RecordRow, Table, image_key

_EXAMPLES = 10  # groups that the manifest names, and names of each


def find_duplicates(table: Table) -> Json:
    """Return the numbers of groups and images, and examples, as the manifest stores them.

    One image that the layout writes into two .rec files is no duplicate.
    """
    classes = table.classes()
    groups = images = across = unlabeled = 0
    has_unlabeled = bool(
        list(table.query(f"SELECT 1 FROM records WHERE label = {NO_LABEL} LIMIT 1"))
    )
    examples: list[list[str]] = []
    for group in _equal_images(table):
        origins = {_origin(record) for record, _ in group}
        if len(origins) > 1:
            groups += 1
            images += len(origins)
            parts = {prefix.partition("_")[0] for _, prefix in group}
            across += len(parts) > 1
            unlabeled += len({record.label == NO_LABEL for record, _ in group}) > 1
            if len(examples) < _EXAMPLES:
                named = {f"{image_key(classes, record)} ({prefix})" for record, prefix in group}
                examples.append(sorted(named)[:_EXAMPLES])
    found = {"groups": groups, "images": images, "across_splits": across, "examples": examples}
    return found | ({"with_and_without_label": unlabeled} if has_unlabeled else {})


def describe_duplicates(found: Mapping[str, Any]) -> str:
    """Return a warning about duplicates; "" when there are none."""
    if not found["groups"]:
        return ""
    across, unlabeled = found["across_splits"], found.get("with_and_without_label", 0)
    shown = "; ".join(" = ".join(group[:3]) for group in found["examples"][:3])
    return (
        f"{found['images']} images are there more than once, in {counted(found['groups'], 'group')}"
        f"{f', {across} of them in training and validation both' if across else ''}"
        f"{f', {unlabeled} of them with a label and without one' if unlabeled else ''}: {shown}"
    )


def _equal_images(table: Table) -> Iterator[list[tuple[RecordRow, str]]]:
    """Yield groups of records, with their prefix, whose images are equal."""
    query = (
        "SELECT written.size, crc32, shards.prefix, shards.file, offset, length, records.* "
        "FROM written JOIN (SELECT size, crc32 FROM written GROUP BY 1, 2 HAVING count(*) > 1) "
        "USING (size, crc32) JOIN records USING (id) JOIN shards ON records.id "
        "BETWEEN first_id AND first_id + shards.records - 1 ORDER BY 1, 2, records.id"
    )
    for _, group in groupby(table.query(query), lambda row: row[:2]):
        found = [(row[2:6], RecordRow(*row[6:])) for row in group]
        if len({_origin(record) for _, record in found}) == 1:
            continue  # one image in two files
        equal: dict[bytes, list[tuple[RecordRow, str]]] = defaultdict(list)
        for (prefix, file, offset, length), record in found:
            digest = _image_digest(table.folder / file, offset, length)
            equal[digest].append((record, prefix))
        yield from (records for records in equal.values() if len(records) > 1)


def _origin(record: RecordRow) -> tuple[int, str, int]:
    return record.source, record.path, record.start


def _image_digest(file: Path, offset: int, length: int) -> bytes:
    """Return a digest of a record without label and id; where it is cut depends on the image."""
    with file.open("rb") as shard:
        framed = os.pread(shard.fileno(), length - HEAD_SIZE, offset + HEAD_SIZE)
    return hashlib.sha256(framed).digest()
