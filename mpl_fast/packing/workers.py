"""The process pool that writes shards: images stay in one process, and a death is an error."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mpl_fast.errors import UserError
from mpl_fast.packing.plan import ShardPlan
from mpl_fast.packing.shard import ShardResult, write_shard

_POLL = 0.2  # seconds between two looks at the workers' counters
# Shared by all processes: [stop, images of job 0, bytes of job 0, images of job 1, ...]
_board: Any = None


def write_shards(
    jobs: Sequence[tuple[ShardPlan, Path]],
    processes: int,
    progress: Callable[[int, int], None],
) -> list[ShardResult]:
    """Write each (plan, target) in its own job; return the results in the order of jobs.

    progress is called a few times a second with the images and bytes done so far.
    """
    context = multiprocessing.get_context("spawn")
    board = context.RawArray("q", 1 + 2 * len(jobs))
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), context, initializer=_start_worker, initargs=(board,)
    )
    futures: dict[int, Future[ShardResult]] = {}
    try:
        # Workers inherit the blocked Ctrl-C: only the parent answers it, once they are started.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in sorted(range(len(jobs)), key=lambda job: -_size(jobs[job][0])):
                futures[number] = pool.submit(_work, number, *jobs[number])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pending = set(futures.values())
        while pending:
            done, pending = wait(pending, _POLL, FIRST_COMPLETED)
            for future in done:
                future.result()
            progress(sum(board[1::2]), sum(board[2::2]))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended without a word (killed, or out of memory): nothing was kept; "
            "run again, with a smaller -j if memory is short"
        ) from error
    finally:
        board[0] = 1
        pool.shutdown(cancel_futures=True)
    return [futures[number].result() for number in range(len(jobs))]


def _size(plan: ShardPlan) -> int:
    """Return a shard's bytes: the largest begins first, so that none is left over for the end."""
    return sum(image.size for image in plan.images)


def _start_worker(board: Any) -> None:
    global _board
    _board = board
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone (SIGKILL): it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, plan: ShardPlan, target: Path) -> ShardResult:
    def advance(size: int) -> bool:
        _board[1 + 2 * number] += 1
        _board[2 + 2 * number] += size
        return not _board[0]

    return write_shard(plan, target, advance)
