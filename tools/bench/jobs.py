"""Runs a command in a process group of its own, with a log and a time limit."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from mpl_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    with (out / f"{name}.log").open("w", encoding="utf-8") as log, _Signals() as signals:
        child = _started(command, log)
        try:
            signals.wait_for(child, limit)
            in_time = True
        except subprocess.TimeoutExpired:
            pass
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, number)
                    child.wait(grace)
    code = child.poll()  # None: a driver's call that does not return keeps even a killed process
    code = -signal.SIGKILL if code is None else code
    return Ended(name, code, time.monotonic() - began, in_time)


class _Signals:
    """Makes signals a `KeyboardInterrupt`: in `wait_for` at once, else at the end, since one that
    comes while a command is being started or ended would leave it running.

    By handlers and not by a mask of signals, which would be that of one thread: libraries start
    others, and any of them may take the signal.
    """

    def __init__(self) -> None:
        self._waiting = self._came = False

    def __enter__(self) -> "_Signals":
        handled = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came and kind is None:
            raise KeyboardInterrupt

    def wait_for(self, child: "subprocess.Popen[bytes]", limit: float) -> None:
        """Raises `TimeoutExpired` after `limit` seconds."""
        try:
            self._waiting = True
            if self._came:
                raise KeyboardInterrupt
            child.wait(limit)
        finally:
            self._waiting = False

    def _handle(self, *_: object) -> None:
        self._came = True
        if self._waiting:
            self._waiting = False  # the next one must not interrupt the end
            raise KeyboardInterrupt


def interrupt_on_signals() -> None:
    """A SIGTERM, and the SIGHUP of a closed terminal, are then a `KeyboardInterrupt` as Ctrl-C is,
    so that what runs is ended, too. What the caller ignores, as nohup SIGHUP, stays ignored."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def chosen(
    names: Sequence[str], only: Sequence[str], skip: Sequence[str] = (), others: Sequence[str] = ()
) -> list[str]:
    """Of `names` those that begin with a word of `only` and with none of `skip`.

    Raises `ConfigError` for a word with which none of them begins, nor of `others`, which exist
    with other options.
    """
    known = dict.fromkeys((*names, *others))
    for option, words in (("only", only), ("skip", skip)):
        for word in words:
            if not any(name.startswith(word) for name in known):
                raise ConfigError(f"--{option} {word}: there are {', '.join(known)}")
    found = [n for n in names if n.startswith(tuple(only)) and not n.startswith(tuple(skip))]
    if not found:
        raise ConfigError(f"nothing to run is left: there are {', '.join(names)}")
    return found


def _started(command: Sequence[str], log: TextIO) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )


def tail(log: Path, lines: int = TAIL) -> str:
    """The end of a log; empty if there is none."""
    printed = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(printed[-lines:])
