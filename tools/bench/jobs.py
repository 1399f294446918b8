"""Runs a command in a process group of its own, with a log and a time limit."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[2]
STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
TAIL = 12  # lines of a log that are shown if a command failed


class Ended(NamedTuple):
    """How a command ended."""

    name: str
    code: int  # negative: by that signal
    seconds: float
    in_time: bool = True

    @property
    def well(self) -> bool:
        """By itself, with exit code 0."""
        return self.in_time and self.code == 0

    @property
    def how(self) -> str:
        """In words."""
        if not self.in_time:
            return "ended: its time was over"
        return "done" if self.code == 0 else f"failed with code {self.code}"


def run(name: str, command: Sequence[str], out: Path, limit: float, grace: float = GRACE) -> Ended:
    """Runs a command in the repository's root; its output goes to OUT/NAME.log.

    After `limit` seconds, or an exception such as Ctrl-C, all processes of its group get a SIGTERM
    and `grace` seconds later a SIGKILL; also those that the command left behind.
    """
    began, in_time = time.monotonic(), False
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        # A signal that came while it is being started would leave it running.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            child = _started(command, log, mask)
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            raise
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(limit)
                in_time = True
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, number)
                    child.wait(grace)
    return Ended(name, child.wait(), time.monotonic() - began, in_time)


def _started(
    command: Sequence[str], log: TextIO, mask: Iterable[signal.Signals | int]
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
    )


def tail(log: Path, lines: int = TAIL) -> str:
    """The end of a log; empty if there is none."""
    printed = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(printed[-lines:])
