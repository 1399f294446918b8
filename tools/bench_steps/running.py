"""Runs one job to its end or to the end of its time, and leaves none of its processes behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PATIENCE = 3.0  # seconds between the polite signal and the other


class Ended(NamedTuple):
    """How a job ended."""

    name: str
    code: int | None  # None: its time was over
    seconds: float
    limit: float

    @property
    def well(self) -> bool:
        """It ended by itself, and found no fault."""
        return self.code == 0

    @property
    def how(self) -> str:
        """In words."""
        if self.code is None:
            return f"ended after its {self.limit:.0f} s"
        return "done" if self.well else f"failed with code {self.code}"


def run(
    name: str,
    command: Sequence[str],
    log: Path,
    limit: float,
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs in `folder`; what it says goes to `log`. After `limit` seconds it is ended."""
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    return Ended(name, code, time.monotonic() - began, limit)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The whole group: compilers and ranks that it has started, as well."""
    if child.poll() is None:
        _signal(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(group, number)
