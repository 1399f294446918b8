"""The job that packs one shard, run by a pool of processes here.

A job is told the work folder and the number of its shard and nothing else: no image crosses from
one process to another, and no machine needs to know of the others.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, ShardRow, reading
from mpl_fast.packing.write.pool import Advance, Job, run_jobs
from mpl_fast.packing.write.shard import StoppedError, write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt

_CHUNK = 8 << 20  # bytes hashed at a time
_LOOK = 0.2  # seconds between two looks whether a shard is free


@dataclass(frozen=True)
class Jobs:
    """The shards to be written, by number, and how."""

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
    """Write a shard unless it is there, whole; return what was remarked about its images.

    advance is told of images and bytes done; when it returns False, StoppedError ends the job.
    """
    with reading(work / TABLE) as table:
        shard = table.shard(number)
    with _held(work / f"{shard.file}.lock", lambda: advance(0, 0)):
        done = _whole(work, shard, lambda: advance(0, 0))
        if done is not None:
            advance(shard.records, shard.bytes)
        else:
            # A file that is not as it was noted must not be taken for finished if this fails.
            (work / f"{shard.file}.done").unlink(missing_ok=True)
            done = write_shard(
                work, number, image_options, read_threads, lambda size: advance(1, size)
            )
    return done.remarks


@contextmanager
def _held(path: Path, go_on: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other machine is at this shard: parts of 3 and parts of 4 overlap."""
    with output_errors(path):
        while (lock := _try_lock(path)) is None:
            if not go_on():
                raise StoppedError
            time.sleep(_LOOK)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of a locked file at path, None while another holds it."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:  # else its holder has just removed it
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _whole(work: Path, shard: ShardRow, go_on: Callable[[], bool]) -> ShardReceipt | None:
    """Return what was noted when the shard was finished; None when it is not as it was then."""
    path = work / shard.file
    try:
        done = ShardReceipt.load(work / f"{shard.file}.done")
        if (done.content, done.stamps) != (shard.content, shard.stamps):
            return None
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if not go_on():
                    raise StoppedError
    except (DataError, OSError):
        return None
    return done if digest.hexdigest() == done.sha256 else None


def run_local(
    jobs: Jobs, processes: int, progress: Callable[[int, int], None]
) -> list[list[Remark]]:
    """Run every job in a pool of processes; return the remarks in the order of the shards.

    progress is called a few times a second with the images and bytes done so far.
    """
    how = (jobs.image_options, jobs.read_threads)
    calls = [
        Job(shard.file, shard.bytes, partial(run_job, jobs.work, shard.number, *how))
        for shard in jobs.shards
    ]
    return run_jobs(calls, processes, progress)
