"""Assigns records to shards, and computes the digests that identify a shard or a pack."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict

from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import Table, to_utf8

_TOGETHER = 1000  # records
# What determines the bytes of records, and where their images are; the time is that of the file
# that contains them.
_LINES = """
SELECT CAST(group_concat(id || char(9) || label || char(9) || name || char(9) || bytes ||
                         char(10), '') AS BLOB),
       CAST(group_concat(path || char(9) || start || char(9) || time || char(10), '') AS BLOB),
       sum(bytes)
FROM (SELECT id, label, name, records.size AS bytes, path, start,
             CASE WHEN start < 0 THEN records.stamp ELSE sources.stamp END AS time
      FROM records CROSS JOIN sources ON number = source WHERE id BETWEEN ? AND ? ORDER BY id)
"""


def shard_file(prefix: str, number: int, shards: int) -> str:
    """Return the name of a shard; the only one of a prefix has no number."""
    return f"{prefix}.rec" if shards == 1 else f"{prefix}-{number:05d}-of-{shards:05d}.rec"


def shard_starts(sizes: Iterable[tuple[int]], records: int, size: int, shards: int) -> list[int]:
    """Return the first record of each shard, of consecutive records of about equal bytes.

    sizes are rows; size is their sum, of so many records; no shard is empty.
    """
    starts, before, number, wanted = [0], 0, 1, -(-2 * size // shards)
    for at, (own,) in enumerate(sizes):
        if number == shards:
            break
        # By the middle of the record; every later shard needs one of the remaining records.
        if (2 * before + own >= wanted and before) or at == records - shards + number:
            starts.append(at)
            number += 1
            wanted = -(-2 * size * number // shards)
        before += own
    return starts


def shard_digests(
    table: sqlite3.Connection, file: str, ids: range, image_options: ImageOptions
) -> tuple[int, str, str]:
    """Return the bytes of the images of a shard, and `ShardRow.content` and `stamps`."""
    settings = asdict(image_options)
    # Whether a bad image fails or is skipped does not affect a shard that has none.
    settings["on_bad"] = image_options.on_bad == "convert"
    content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    stamps, size = hashlib.sha256(), 0
    for at in range(0, len(ids), _TOGETHER):
        some = ids[at : at + _TOGETHER]
        lines, places, part = table.execute(_LINES, (some[0], some[-1])).fetchone()
        content.update(lines)
        stamps.update(places)
        size += part
    content.update(file.encode())
    return size, content.hexdigest(), stamps.hexdigest()


def plan_digest(table: Table) -> str:
    """Return the sha256 of all that determines the bytes of a pack, not of its images' location."""
    digest = hashlib.sha256(to_utf8("\n".join([*table.classes(), *table.titles()])))
    for shard in table.shards():
        digest.update(f"\n{shard.file} {shard.content}".encode())
    for (labeled,) in table.query("SELECT id FROM records WHERE labeled ORDER BY id"):
        digest.update(b"%d " % labeled)
    options = table.options()
    digest.update(f"\n{options['layout']} {options['unlabeled']}".encode())
    return digest.hexdigest()
