"""Processes of the campaign: their descendants, SIGKILL, and what they use."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ORPHAN_SECONDS = 20.0  # after which a process whose parent was killed is a fault
LIMIT = 900.0  # seconds of a process that should end by itself


class Used(NamedTuple):
    """What a process uses."""

    memory: int  # bytes, resident
    files: int  # open descriptors
    threads: int


def started(command: Sequence[str], log: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Starts a command as a shell would, with its output in a log."""
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)


def ended(process: "subprocess.Popen[bytes]", limit: float = LIMIT) -> int | None:
    """The exit code of a process; None, and it is killed, if it takes too long."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        kill([process.pid, *descendants(process.pid)])
        process.wait()
        return None


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, parents first."""
    children = dict[int, list[int]]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop(0)
        waiting += children.get(one, [])
        found += children.get(one, [])
    return found


def kill(pids: Sequence[int]) -> int:
    """SIGKILL; returns how many of the processes were there."""
    killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def orphans(pids: Sequence[int]) -> list[int]:
    """Processes that outlive a kill for `ORPHAN_SECONDS`; they are killed then."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    left = [*pids]
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if alive(pid)]
        time.sleep(0.05)
    kill(left)
    return left


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def used(pid: int) -> Used | None:
    """What a process uses now; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        files = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
        return Used(1024 * int(lines["VmRSS"].split()[0]), files, int(lines["Threads"]))
    except (OSError, KeyError):
        return None
