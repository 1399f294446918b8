"""Images that a pack contains more than once.

They are searched by size and CRC-32 of the packed image, and those that agree are compared: CRC-32
is that of PNG's chunks too, so that of a whole PNG depends on few bits of its content.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from mpl_fast.data.records import HEAD_SIZE, NO_LABEL
from mpl_fast.first_few import counted
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import RecordRow, Table, image_key

_EXAMPLES = 10  # groups that the manifest names, and names of each
_SHARD = "JOIN shards ON id BETWEEN first_id AND first_id + shards.records - 1"


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
    for group in (_Group(classes, records) for records in _equal_images(table)):
        if group.images > 1:
            groups += 1
            images += group.images
            across += len(group.parts) > 1
            unlabeled += len(group.has_label) > 1
            if len(examples) < _EXAMPLES:
                examples.append(group.names)
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


class _Group:
    """What is counted of equal images; its memory does not grow with their number."""

    def __init__(self, classes: list[str], records: Iterable[tuple[RecordRow, str]]) -> None:
        self.images = 0  # without those that the layout writes twice
        self.parts: set[str] = set()  # training, validation
        self.has_label: set[bool] = set()
        self.names: list[str] = []  # some of them, sorted
        previous = None
        for record, prefix in records:
            origin = record.source, record.path, record.start
            self.images += origin != previous
            previous = origin
            self.parts.add(prefix.partition("_")[0])
            self.has_label.add(record.label != NO_LABEL)
            name = f"{image_key(classes, record)} ({prefix})"
            self.names = sorted({*self.names, name})[:_EXAMPLES]


def _equal_images(table: Table) -> Iterator[Iterator[tuple[RecordRow, str]]]:
    """Yield groups of records, with their prefix, whose images are equal, ordered by origin."""
    # On disk: there may be as many of them as images.
    list(table.query("CREATE TEMP TABLE digests(id INTEGER PRIMARY KEY, digest BLOB NOT NULL)"))
    alike = (
        "WITH alike AS (SELECT size, crc32 FROM written GROUP BY 1, 2 HAVING count(*) > 1), "
        # Not those of which one image is in two files.
        "several AS (SELECT written.size, crc32 FROM written JOIN alike USING (size, crc32) "
        "JOIN records USING (id) GROUP BY 1, 2 HAVING min(source) < max(source) "
        "OR min(path) < max(path) OR min(start) < max(start)) "
        f"SELECT id, file, offset, length FROM written JOIN several USING (size, crc32) {_SHARD}"
    )
    for number, file, offset, length in table.query(alike):
        digest = _image_digest(table.folder / file, offset, length)
        list(table.query("INSERT INTO digests VALUES (?, ?)", (number, digest)))
    query = (
        "SELECT written.size, crc32, digest, prefix, records.* FROM digests "
        f"JOIN written USING (id) JOIN records USING (id) {_SHARD} "
        "ORDER BY 1, 2, 3, source, path, start"
    )
    for _, group in groupby(table.query(query), lambda row: row[:3]):
        yield ((RecordRow(*row[4:]), row[3]) for row in group)


def _image_digest(file: Path, offset: int, length: int) -> bytes:
    """Return a digest of a record without label and id; where it is cut depends on the image."""
    with file.open("rb") as shard:
        framed = os.pread(shard.fileno(), length - HEAD_SIZE, offset + HEAD_SIZE)
    return hashlib.sha256(framed).digest()
