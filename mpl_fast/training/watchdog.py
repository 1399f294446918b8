"""Finds ranks that stop and ranks that are slow.

A rank that is stopped, or waits for a disk or a loader for ever, lets the others wait in their next
collective. Each rank has a thread that ends its process after `--hang-timeout` seconds without a
step, so that the launcher ends the others, and restarts all if it may.
"""

import faulthandler
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mpl_fast import distributed
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import HUNG, STDERR
from mpl_fast.learner import compilation

FOLDER = "hang"  # in the run directory
LONG_BEATS = 2  # the work that takes long, and the step after it, in which ranks wait for others
REPORT = "watchdog report"  # the thread
REPORT_SECONDS = 5.0  # for a report to a disk that may block, and for those of other ranks
SLOW_FACTOR, SLOW_STEPS = 2.0, 100


class Watchdog:
    """Ends this rank with exit code `HUNG` after `timeout` seconds without a beat; 0: never.

    A save makes progress when data reaches the disk, so a slow disk is none that blocks.

    Before the end it appends rank, step and the stacks of all threads to ``hang/rank_N.txt`` in the
    run directory; a rank without such a file is the one that stopped. The latest exchanges
    between ranks are written beside it, to ``gloo_trace_rank_N`` and, on GPUs,
    ``nccl_trace_rank_N``. Time in which the process itself is
    stopped and continued does not count. It cannot report a thread that holds Python's lock for
    ever; other ranks end the run then.
    """

    def __init__(
        self,
        run_dir: Path,
        dist_env: DistEnv,
        timeout: float,
        hung: Callable[[str], object] = lambda why: None,
    ) -> None:
        """`hung` is called before the end, with the reason."""
        self._folder, self._dist_env, self._timeout = run_dir / FOLDER, dist_env, timeout
        self._hung = hung
        self._step, self._idle, self._long = 0, 0.0, 0
        self._ended, self._reported = threading.Event(), threading.Event()

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Inside, the thread runs. `step`: steps done before."""
        if not self._timeout:
            yield
            return
        self._step = step
        self._ended.clear()
        self.expect_long_work()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            with compilation.on_start(self.expect_long_work):
                yield
        finally:
            self._ended.set()
            thread.join()

    def beat(self, step: int | None = None) -> None:
        """Reports progress: `step` steps are done, or a batch of an evaluation is."""
        self._step = self._step if step is None else step
        self._long = max(0, self._long - 1)
        self._idle = 0.0

    def expect_long_work(self) -> None:
        """Allows `distributed.long_timeout` seconds for each of the next two beats."""
        self._long = LONG_BEATS
        self._idle = 0.0

    def not_idle(self) -> None:
        """Reports progress of another thread, for which this one may wait."""
        self._idle = 0.0

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 10)
        before = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            self._idle += min(now - before, 2 * interval)  # not while the process was stopped
            before = now
            long = self._long > 0
            if self._idle > (distributed.long_timeout(self._timeout) if long else self._timeout):
                self._end()

    def _end(self) -> NoReturn:
        what = (
            f"rank {self._dist_env.rank} of {self._dist_env.world} on {socket.gethostname()} "
            f"(process {os.getpid()}) has made no progress for {self._idle:.0f} s after step "
            f"{self._step}"
        )
        threading.Thread(target=self._report, args=(what,), name=REPORT, daemon=True).start()
        written = self._reported.wait(REPORT_SECONDS)
        file = self._file("rank_", ".txt")
        where = f"its stack is in {file}"
        if not written:
            where = f"{file} cannot be written: its stack is below"
        message = (
            f"train: error: {what}: {where}; a rank without such a file is the one that stopped. "
            "If steps take so long, give a larger --hang-timeout"
        )
        with suppress(OSError):
            os.write(STDERR, f"{message}\n".encode())
            if not written:
                faulthandler.dump_traceback(STDERR)
        time.sleep(REPORT_SECONDS)  # torchrun ends all ranks as soon as one has ended
        os._exit(HUNG)

    def _report(self, what: str) -> None:
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with self._file("rank_", ".txt").open("a", encoding="utf-8") as report:
                print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), what, file=report)
                report.flush()
                faulthandler.dump_traceback(report)
            self._reported.set()
            self._hung(f"{what}: its stack is in {self._file('rank_', '.txt')}")
            for backend, trace in distributed.traces().items():
                self._file(f"{backend}_trace_rank_", "").write_bytes(trace)

    def _file(self, prefix: str, suffix: str) -> Path:
        return self._folder / f"{prefix}{self._dist_env.rank}{suffix}"


class Stragglers:
    """Names ranks that take more than `SLOW_FACTOR` times as long as the others for `SLOW_STEPS`
    steps."""

    def __init__(self, hosts: list[str]) -> None:
        """`hosts`: of each rank."""
        self._hosts = hosts
        self._slow_steps = [0] * len(hosts)

    def add(self, seconds: list[float], steps: int) -> list[str]:
        """Adds each rank's median time of `steps` steps; returns a warning for each rank that has
        now been slow for long enough. One that stays slow is not named again."""
        warnings = []
        for rank, own in enumerate(seconds):
            others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
            before = self._slow_steps[rank]
            self._slow_steps[rank] = before + steps if own > SLOW_FACTOR * others else 0
            if before < SLOW_STEPS <= self._slow_steps[rank]:
                warnings.append(
                    f"rank {rank} on {self._hosts[rank]} is slow: its steps take "
                    f"{own / max(others, 1e-9):.1f} times those of the others "
                    f"({1000 * own:.0f} ms against {1000 * others:.0f} ms), which wait for it"
                )
        return warnings
