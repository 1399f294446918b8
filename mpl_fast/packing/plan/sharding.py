"""Assigns records to shards, and computes the digests that identify a shard or a pack."""

import hashlib
import json
from dataclasses import asdict

from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import RecordRow, Table, to_utf8


def shard_file(prefix: str, number: int, shards: int) -> str:
    """Return the name of a shard; the only one of a prefix has no number."""
    return f"{prefix}.rec" if shards == 1 else f"{prefix}-{number:05d}-of-{shards:05d}.rec"


class ShardAssigner:
    """Assigns consecutive records to shards of about equal bytes, none of them empty."""

    def __init__(self, records: int, size: int, shards: int) -> None:
        self._left, self._size, self._shards = records, size, shards
        self._before = 0
        self._shard = 0

    def assign(self, size: int) -> int:
        """Return the shard of the next record, of that many bytes."""
        # By the middle of the record; every later shard needs one of the remaining records.
        wanted = (2 * self._before + size) * self._shards // max(2 * self._size, 1)
        # For an empty file at the end this would be one beyond the last shard.
        if self._before and self._shard < min(wanted, self._shards - 1):
            self._shard += 1
        self._shard = max(self._shard, self._shards - self._left)
        self._before += size
        self._left -= 1
        return self._shard


class ShardDigest:
    """Two sha256 of a shard: of what determines its bytes, and of its images' paths and times."""

    def __init__(self, image_options: ImageOptions) -> None:
        settings = asdict(image_options)
        # Whether a bad image fails or is skipped does not affect a shard that has none.
        settings["on_bad"] = image_options.on_bad == "convert"
        self._content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self._stamps = hashlib.sha256()
        self.records = self.bytes = 0

    def add(self, row: RecordRow, stamp: int) -> None:
        """Add a record; stamp is the modification time of the file that contains its image."""
        self.records += 1
        self.bytes += row.size
        self._content.update(to_utf8(f"{row.id}\t{row.label}\t{row.name}\t{row.size}\n"))
        self._stamps.update(to_utf8(f"{row.path}\t{row.start}\t{stamp}\n"))

    def content(self, file: str) -> str:
        """Return the sha256 of what determines the bytes of the shard named file."""
        self._content.update(file.encode())
        return self._content.hexdigest()

    def stamps(self) -> str:
        """Return the sha256 of paths, offsets and times."""
        return self._stamps.hexdigest()


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
