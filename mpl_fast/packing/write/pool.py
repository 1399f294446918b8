"""Pool of worker processes with shared progress counters; a worker that dies is an error."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from mpl_fast.errors import UserError
from mpl_fast.first_few import first_few

T = TypeVar("T")
Advance = Callable[[int, int], None]  # called with records and bytes done; may raise StoppedError
_POLL = 0.2  # seconds between two readings of the workers' counters
_RUNNING, _ENDED = 1, 2
# Shared by all processes: [stop, state, records and bytes of job 0, state, ... of job 1, ...]
_board: Any = None


class StoppedError(Exception):
    """The run was interrupted; the job that raises this is not complete."""


class Job(NamedTuple, Generic[T]):
    """One job: its name for messages, its bytes (the largest starts first), and what to call."""

    name: str
    size: int
    call: Callable[[Advance], T]
    records: int = 0


def run_jobs(
    jobs: Sequence[Job[T]], processes: int, progress: Callable[[int, int], None]
) -> list[T]:
    """Run every job in a pool of processes; return their results in the order of jobs.

    progress is called a few times a second with the records and bytes done so far. An error of a
    job stops all others. Raises UserError when a worker process dies.
    """
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")
    board = context.RawArray("q", 1 + 3 * len(jobs))
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), context, initializer=_start_worker, initargs=(board,)
    )
    futures: dict[int, Future[T]] = {}
    workers: list[BaseProcess] = []
    others = multiprocessing.active_children()
    try:
        # Workers inherit the blocked Ctrl-C: only the parent handles it, once they are started.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _deferred(signal.SIGTERM):
                for at in sorted(range(len(jobs)), key=lambda at: -jobs[at].size):
                    futures[at] = pool.submit(_work, at, jobs[at].call)
                workers += multiprocessing.active_children()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pending = set(futures.values())
        while pending:
            done, pending = wait(pending, _POLL, FIRST_COMPLETED)
            for future in done:
                future.result()
            progress(sum(board[2::3]), sum(board[3::3]))
    except BrokenProcessPool as error:
        # The pool waits for ever for a worker that it started while it ended the others.
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.terminate()
        pool.shutdown()  # until it has waited for its processes, not all have their exit codes
        raise UserError(_death(jobs, board, workers)) from error
    finally:
        board[0] = 1
        pool.shutdown(cancel_futures=True)
    return [futures[at].result() for at in range(len(jobs))]


@contextmanager
def _deferred(number: signal.Signals) -> Iterator[None]:
    """Delays a signal's handler: a worker that is interrupted while it is started prints a
    traceback. It is not blocked, since workers would inherit that."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    handler = signal.signal(number, lambda got, _frame: received.append(got))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if received:
            signal.raise_signal(number)


def _death(jobs: Sequence[Job[T]], board: Any, workers: Sequence[BaseProcess]) -> str:
    """Return the error message for a dead worker: its signal or exit code, and the running jobs."""
    # The pool itself ends the other workers with SIGTERM.
    codes = {worker.exitcode for worker in workers} - {None, 0, -signal.SIGTERM}
    ends = [_end(code) for code in codes if code is not None] or ["SIGTERM"]
    running = [job.name for at, job in enumerate(jobs) if board[1 + 3 * at] == _RUNNING]
    where = f" while it was at one of: {first_few(running)}" if running else ""
    return (
        f"a worker process died ({', '.join(ends)}; out of memory?){where}; what "
        "is finished is kept: run the same command again, with a smaller -j if memory is short"
    )


def _end(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _start_worker(board: Any) -> None:
    global _board
    _board = board
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(at: int, call: Callable[[Advance], T]) -> T:
    def advance(records: int, size: int) -> None:
        _board[2 + 3 * at] += records
        _board[3 + 3 * at] += size
        if _board[0]:
            raise StoppedError

    _board[1 + 3 * at] = _RUNNING
    result = call(advance)
    _board[1 + 3 * at] = _ENDED
    return result
