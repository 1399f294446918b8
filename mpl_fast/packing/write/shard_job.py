"""The job that writes one shard unless it is already complete."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpl_fast import locks
from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.checksum import file_checksum
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import ShardRow
from mpl_fast.packing.write.pool import Advance
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt, receipt_path

_LOCK_POLL = 0.2  # seconds between two attempts to lock a shard


def run_job(
    work: Path,
    shard: ShardRow,
    image_options: ImageOptions,
    read_threads: int,
    advance: Advance,
    *,
    lock: bool = True,
) -> list[Remark]:
    """Write a shard unless it is complete and undamaged; return the remarks about its images.

    Arguments and result are small: images never cross between processes. advance is called with
    images and bytes done. `lock`: another machine may have the same job.
    """
    with _locked(work / f"{shard.file}.lock", advance, lock=lock):
        receipt = _valid_receipt(work, shard, advance)
        if receipt is not None:
            advance(shard.records, shard.bytes)
        else:
            # If writing fails, a file that differs from its receipt must not pass for finished.
            receipt_path(work, shard.file).unlink(missing_ok=True)
            receipt = write_shard(work, shard, image_options, read_threads, advance)
    return receipt.remarks


@contextmanager
def _locked(path: Path, advance: Advance, *, lock: bool) -> Iterator[None]:
    """Wait until no other machine writes this shard: parts I/3 and J/4 overlap."""
    with output_errors(path), path.open("a") as file:
        while lock and not locks.lock(file, path.parent):
            advance(0, 0)
            time.sleep(_LOCK_POLL)
        yield


def _valid_receipt(work: Path, shard: ShardRow, advance: Advance) -> ShardReceipt | None:
    """Return the receipt of a shard if it is of this plan and the .rec file matches it."""
    try:
        receipt = ShardReceipt.load(receipt_path(work, shard.file))
        if (receipt.content, receipt.stamps) != (shard.content, shard.stamps):
            return None
        found = file_checksum(work / shard.file, "crc32", lambda size: advance(0, 0))
    except (DataError, OSError):
        return None
    return receipt if found == receipt.checksum else None
