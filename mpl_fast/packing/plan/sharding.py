"""Where a pack is cut into shards, and the digests that tell one shard or pack from another."""

import hashlib
import json
from dataclasses import asdict

from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import RecordRow, Table, raw


def shard_file(prefix: str, number: int, shards: int) -> str:
    """Return the name of a shard; the only one of a prefix has no number."""
    return f"{prefix}.rec" if shards == 1 else f"{prefix}-{number:05d}-of-{shards:05d}.rec"


class Cut:
    """Tells each record's shard, so that all shards hold about the same bytes and none is empty."""

    def __init__(self, records: int, size: int, shards: int) -> None:
        self._left, self._size, self._shards = records, size, shards
        self._before = 0
        self._shard = 0

    def shard(self, size: int) -> int:
        """Return the shard of the next record, of that many bytes."""
        # The middle of the record decides; every later shard needs one of the records left.
        wanted = (2 * self._before + size) * self._shards // max(2 * self._size, 1)
        # The middle of an empty file at the end lies beyond the last shard.
        if self._before and self._shard < min(wanted, self._shards - 1):
            self._shard += 1
        self._shard = max(self._shard, self._shards - self._left)
        self._before += size
        self._left -= 1
        return self._shard


class Digest:
    """What decides a shard's bytes, and what tells whether its images changed, as two sha256."""

    def __init__(self, image_options: ImageOptions) -> None:
        settings = asdict(image_options)
        # Whether a bad image fails or is skipped decides nothing about a shard that has none.
        settings["on_bad"] = image_options.on_bad == "convert"
        self._content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self._stamps = hashlib.sha256()
        self.records = self.bytes = 0

    def add(self, row: RecordRow, stamp: int) -> None:
        """Take in a record; stamp is the modification time of the file that holds its image."""
        self.records += 1
        self.bytes += row.size
        self._content.update(raw(f"{row.id}\t{row.label}\t{row.name}\t{row.size}\n"))
        self._stamps.update(raw(f"{row.path}\t{row.start}\t{stamp}\n"))

    def content(self, file: str) -> str:
        """Return the sha256 of what decides the bytes of the shard, which is called file."""
        self._content.update(file.encode())
        return self._content.hexdigest()

    def stamps(self) -> str:
        """Return the sha256 of places and times."""
        return self._stamps.hexdigest()


def plan_digest(table: Table) -> str:
    """Return a sha256 over all that decides the bytes of a pack; where its images lie does not."""
    digest = hashlib.sha256(raw("\n".join(table.classes())))
    for shard in table.shards():
        digest.update(f"\n{shard.file} {shard.content}".encode())
    for (labeled,) in table.query("SELECT id FROM records WHERE labeled ORDER BY id"):
        digest.update(b"%d " % labeled)
    options = table.options()
    digest.update(f"\n{options['layout']} {options['unlabeled']}".encode())
    return digest.hexdigest()
