"""What a person sees of a run: plain lines every few seconds, and a moving bar on a terminal
only."""

import os
import sys
import time

from mpl_fast.training.metrics import Row

SECONDS = 5.0  # between two lines, at the least
SHOWN = {
    "loss/labeled": "labeled",
    "loss/consistency": "consistency",
    "loss/student": "student",
    "mask_rate": "mask",
    "h": "h",
}


class Console:
    """Speaks for rank 0; the other ranks have a silent one."""

    def __init__(self, steps: int, *, silent: bool) -> None:
        self.steps, self.silent = steps, silent
        self.bar = sys.stdout.isatty() and not silent
        self._spoke = 0.0
        self._first: tuple[int, float] | None = None
        self._latest = ""

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.silent:
            self._print(f"\r\033[K{text}" if self.bar else text)

    def warn(self, text: str) -> None:
        """A line on standard error."""
        if not self.silent:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def row(self, done: int, row: Row) -> None:
        """Remembers a row of metrics and shows it if the last line is some seconds old."""
        wanted = [f"{short} {row[name]:.3g}" for name, short in SHOWN.items() if name in row]
        rates = _rates({k.removeprefix("lr/"): v for k, v in row.items() if k.startswith("lr/")})
        speed = f"{row['images_per_second']:.0f} img/s, data wait {100 * row['data_wait']:.0f} %"
        self._latest = " | ".join([speed, *wanted, rates])
        if time.perf_counter() - self._spoke >= SECONDS or done == self.steps:
            self.say(f"{self._progress(done)} | {self._latest}")
            self._spoke = time.perf_counter()

    def tick(self, done: int) -> None:
        """A sign of life between rows: the bar on a terminal, else a line when it has been quiet
        long."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (done, now)
            self._spoke = now
        if self.bar:
            filled = 24 * done // self.steps
            drawn = "█" * filled + "·" * (24 - filled)
            self._print(f"\r\033[K{drawn} {self._progress(done)}", end="")
        elif now - self._spoke >= 2 * SECONDS:
            self.say(f"{self._progress(done)} | {self._latest or 'first steps'}")
            self._spoke = now

    def _print(self, text: str, end: str = "\n") -> None:
        """A reader that has gone, as in `train.py | head`, does not end a run of days."""
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:
            self.silent, self.bar = True, False
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115

    def _progress(self, done: int) -> str:
        return f"step {done:>{len(str(self.steps))}}/{self.steps} | ETA {self._eta(done)}"

    def _eta(self, done: int) -> str:
        if self._first is None or done <= self._first[0]:
            return "?"
        begun, at = self._first
        return duration((self.steps - done) * (time.perf_counter() - at) / (done - begun))


def _rates(rates: Row) -> str:
    """``lr 0.1``, or ``lr teacher 0.2, student 0.1``."""
    if len(rates) == 1:
        return f"lr {next(iter(rates.values())):.3g}"
    return "lr " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items())


def quantity(count: int) -> str:
    """``940``, ``77.9 k`` or ``1.47 M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
