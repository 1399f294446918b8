"""Whether a finished folder is as it was packed: every file, every record, and what is damaged."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpl_fast.errors import DataError, UserError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.inspection import load_pack
from mpl_fast.packing.listing_check import check_split, check_table
from mpl_fast.packing.record_check import Advance
from mpl_fast.packing.shard_check import Problem, check_hashes, check_shard

Job = Callable[[Advance], list[Problem]]
_POLL = 0.2  # seconds between two looks at the workers' counters
# Shared by all processes: [stop, records of job 0, bytes of job 0, records of job 1, ...]
_board: Any = None


@dataclass(frozen=True)
class Report:
    """What was checked and all that is wrong."""

    root: Path
    deep: bool
    shards: int
    records: int
    bytes: int
    seconds: float
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {
            "folder": str(self.root),
            "deep": self.deep,
            "sound": not self.problems,
            "shards": self.shards,
            "records": self.records,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "problems": [problem.as_json() for problem in self.problems],
        }

    def lines(self) -> list[str]:
        """Return the report for people: every problem, then what was checked."""
        rate = self.bytes / max(self.seconds, 1e-9)
        how = "decoded every image of" if self.deep else "compared with their checksums"
        counted = f"{self.records} records in {self.shards} .rec files ({self.bytes / 1e9:.3f} GB)"
        what = f"{how} {counted}" if self.deep else f"{counted} {how}"
        found = f"{len(self.problems)} problems" if self.problems else "all is sound"
        end = f"{what} in {self.seconds:.1f} s ({rate / 1e6:.0f} MB/s): {found}"
        return [*map(str, self.problems), end]

    def require_sound(self) -> None:
        """Return when nothing is wrong; else DataError with the first problems and the remedy."""
        if not self.problems:
            return
        files = list(dict.fromkeys(problem.file for problem in self.problems))
        shards = [file for file in files if file.endswith(".rec")]
        remedy = (
            f"delete {first_few(shards, 3)} and run the same pack command again: only that is "
            "packed anew"
            if shards == files and not all(p.text.startswith("undamaged") for p in self.problems)
            else "delete the folder's files and pack again"
        )
        listed = first_few(map(str, self.problems), 3, "; ")
        raise DataError(f"{self.root}: {len(self.problems)} problems: {listed}; {remedy}")


def verify(
    root: Path, *, deep: bool, processes: int, progress: Callable[[int, int], None]
) -> Report:
    """Check every file of a finished folder; deep also decodes every image.

    progress is called a few times a second with the records and bytes that are done. What is
    damaged is in the report. DataError when there is no finished pack, UserError when a worker
    dies.
    """
    started = time.monotonic()
    manifest = load_pack(root)
    shards, problems = check_table(root, manifest)
    # The largest begins first, so that none is left over for the end.
    entries = sorted(manifest["shards"], key=lambda entry: -int(entry["bytes"]))
    jobs: list[Job] = []
    for entry in entries:
        if entry["file"] in shards:
            jobs.append(partial(check_shard, root, entry, shards[entry["file"]], deep))
        else:
            jobs.append(partial(check_hashes, root, entry))
    jobs += [partial(check_split, root, split, shards) for split in manifest["splits"].values()]
    return Report(
        root=root,
        deep=deep,
        shards=len(entries),
        records=sum(entry["records"] for entry in entries),
        bytes=sum(entry["bytes"] for entry in entries),
        problems=(*problems, *_run(jobs, processes, progress)),
        seconds=time.monotonic() - started,
    )


def _run(
    jobs: Sequence[Job], processes: int, progress: Callable[[int, int], None]
) -> list[Problem]:
    """Run jobs in a pool of processes; return what they found, in the order of the jobs."""
    context = multiprocessing.get_context("spawn")
    board = context.RawArray("q", 1 + 2 * len(jobs))
    pool = ProcessPoolExecutor(
        max(1, min(processes, len(jobs))),
        context,
        initializer=_start_worker,
        initargs=(board,),
    )
    futures: list[Future[list[Problem]]] = []
    try:
        # Workers inherit the blocked Ctrl-C: only the parent answers it, once they are started.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures += (pool.submit(_work, at, job) for at, job in enumerate(jobs))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL, FIRST_COMPLETED)
            for future in done:
                future.result()
            progress(sum(board[1::2]), sum(board[2::2]))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended without a word (killed, or out of memory?): what was not "
            "checked is unknown; verify again, with a smaller -j if memory is short"
        ) from error
    finally:
        board[0] = 1
        pool.shutdown(cancel_futures=True)
    return [problem for future in futures for problem in future.result()]


def _work(at: int, job: Job) -> list[Problem]:
    def advance(records: int, size: int) -> bool:
        _board[1 + 2 * at] += records
        _board[2 + 2 * at] += size
        return not _board[0]

    return job(advance)


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
