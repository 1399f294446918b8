"""The job that writes one shard unless it is already complete, and the local engine that runs jobs.

A job receives only the work folder and its shard's number: images never cross between processes,
and machines do not communicate.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpl_fast.atomic import sha256_of
from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, ShardRow, open_table
from mpl_fast.packing.write.pool import Advance, Job, run_jobs
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt, receipt_path

_LOCK_POLL = 0.2  # seconds between two attempts to lock a shard


@dataclass(frozen=True)
class Jobs:
    """The shards to write, and how."""

    work: Path
    shards: Sequence[ShardRow]
    image_options: ImageOptions
    read_threads: int


def run_job(
    work: Path,
    number: int,
    image_options: ImageOptions,
    read_threads: int,
    advance: Advance,
) -> list[Remark]:
    """Write a shard unless it is complete and undamaged; return the remarks about its images.

    advance is called with images and bytes done.
    """
    with open_table(work / TABLE) as table:
        shard = table.shard(number)
    with _locked(work / f"{shard.file}.lock", advance):
        receipt = _valid_receipt(work, shard, advance)
        if receipt is not None:
            advance(shard.records, shard.bytes)
        else:
            # If writing fails, a file that differs from its receipt must not pass for finished.
            receipt_path(work, shard.file).unlink(missing_ok=True)
            receipt = write_shard(work, number, image_options, read_threads, advance)
    return receipt.remarks


@contextmanager
def _locked(path: Path, advance: Advance) -> Iterator[None]:
    """Wait until no other machine writes this shard: parts I/3 and J/4 overlap."""
    with output_errors(path):
        while (lock := _try_lock(path)) is None:
            advance(0, 0)
            time.sleep(_LOCK_POLL)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of the locked file, None while another process holds the lock."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:  # else its holder has just removed it
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _valid_receipt(work: Path, shard: ShardRow, advance: Advance) -> ShardReceipt | None:
    """Return the receipt of a shard if it is of this plan and the .rec file matches it."""
    try:
        receipt = ShardReceipt.load(receipt_path(work, shard.file))
        if (receipt.content, receipt.stamps) != (shard.content, shard.stamps):
            return None
        sha256 = sha256_of(work / shard.file, lambda size: advance(0, 0))
    except (DataError, OSError):
        return None
    return receipt if sha256 == receipt.sha256 else None


def run_local(
    jobs: Jobs, processes: int, progress: Callable[[int, int], None]
) -> list[list[Remark]]:
    """Run all jobs in a pool of processes; return their remarks in the order of the shards.

    progress is called a few times a second with the images and bytes done so far.
    """
    how = (jobs.image_options, jobs.read_threads)
    calls = [
        Job(shard.file, shard.bytes, partial(run_job, jobs.work, shard.number, *how))
        for shard in jobs.shards
    ]
    return run_jobs(calls, processes, progress)
