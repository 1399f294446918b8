"""Console output of a run: a line every few seconds, and a progress bar on a terminal."""

import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mpl_fast.errors import STDERR, OutputError

if TYPE_CHECKING:
    from mpl_fast.training.metrics import Row  # imports torch

MIN_SECONDS = 5.0  # between two rows
SHOWN = {
    "loss/labeled": "labeled",
    "loss/consistency": "consistency",
    "loss/student": "student",
    "mask_rate": "mask",
    "feedback": "feedback",
}


class Console:
    """Prints a run's messages and progress; silent on all ranks but the first.

    No error of its output ends a run, such as a terminal that is gone or a full disk.
    """

    def __init__(self, steps: int, *, silent: bool) -> None:
        self.steps, self.silent = steps, silent
        self.bar = sys.stdout is not None and sys.stdout.isatty() and not silent
        self._failed = False
        self._printed_at = 0.0
        self._first: tuple[int, float] | None = None
        self._latest = ""

    def print(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if not self.silent:
            self._print(f"\r\033[K{text}" if self.bar else text)

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, flush=True)
        except (OSError, OutputError) as error:  # OutputError: of `errors.run_command`
            if not self._failed:
                self.warn(f"the console's output is incomplete from here on: {error}")
            self._failed = True

    def print_in_signal_handler(self, text: str) -> None:
        """Prints a line to standard error without its buffer, which the signal may have found in
        the middle of a write."""
        if not self.silent and sys.stderr:
            line = f"\r\033[K{text}\n" if self.bar else f"{text}\n"
            with suppress(OSError):
                os.write(STDERR, line.encode())

    def warn(self, text: str, rank: int = 0) -> None:
        """Prints a warning to standard error; one that concerns another rank, there."""
        if rank > 0:
            warn(f"rank {rank}: {text}")
        elif not self.silent:
            warn(text)

    def row(self, done: int, row: "Row") -> None:
        """Prints a row of metrics, at most one every `MIN_SECONDS`, and the last one always."""
        shown = [f"{short} {row[name]:.3g}" for name, short in SHOWN.items() if name in row]
        rates = _rates({k.removeprefix("lr/"): v for k, v in row.items() if k.startswith("lr/")})
        speed = f"{row['images_per_second']:.0f} img/s, data wait {100 * row['data_wait']:.0f} %"
        self._latest = " | ".join([speed, *shown, rates])
        if time.perf_counter() - self._printed_at >= MIN_SECONDS or done == self.steps:
            self.print(f"{self._progress(done)} | {self._latest}")
            self._printed_at = time.perf_counter()

    def progress(self, done: int) -> None:
        """Shows progress between rows: the bar on a terminal, else a line after
        2 `MIN_SECONDS` without one."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (done, now)
            self._printed_at = now
        if self.bar:
            filled = 24 * done // self.steps
            drawn = "█" * filled + "·" * (24 - filled)
            self._print(f"\r\033[K{drawn} {self._progress(done)}", end="")
        elif now - self._printed_at >= 2 * MIN_SECONDS:
            self.print(f"{self._progress(done)} | {self._latest or 'first steps'}")
            self._printed_at = now

    def _progress(self, done: int) -> str:
        return f"step {done:>{len(str(self.steps))}}/{self.steps} | ETA {self._eta(done)}"

    def _eta(self, done: int) -> str:
        seconds = self.seconds_left(done)
        return "?" if seconds is None else duration(seconds)

    def seconds_left(self, done: int) -> float | None:
        """Seconds to the last step at the speed of this session; None before its second step."""
        if self._first is None or done <= self._first[0]:
            return None
        begun, at = self._first
        return (self.steps - done) * (time.perf_counter() - at) / (done - begun)


def warn(text: str) -> None:
    """Prints a warning to standard error, if that can be written."""
    with suppress(OSError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _rates(rates: "Row") -> str:
    """``lr 0.1``, or ``lr teacher 0.2, student 0.1``."""
    if len(rates) == 1:
        return f"lr {next(iter(rates.values())):.3g}"
    return "lr " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items())


def quantity(value: float, unit: str = "") -> str:
    """Three digits and an SI prefix: ``940``, ``77.9 k``, or ``1.47 MB`` with the unit ``B``."""
    value = float(f"{value:.3g}")  # or 999,900 would be 1e+03 k
    for prefix, size in zip("EPTGMk", (1e18, 1e15, 1e12, 1e9, 1e6, 1e3), strict=True):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """``3 days``, ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:.0f} days"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
