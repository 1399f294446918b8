"""Runs a command until its output is on the disk and prints what that took, as JSON.

`pack_run.py OUT LOG time|watch COMMAND ...`: OUT is the folder that the command writes to, LOG the
file for what it prints. `watch` also looks at the peak resident memory (VmHWM, with shared pages)
of the command and of its workers, every 10 ms. A script of its own, for the peak memory that the
system reports of a command begins with that of the process that started it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.01  # s


def main() -> None:
    """Prints the exit code, `wall` and `cpu` seconds, and `peak_mib` of the largest process.

    When it watches, also `parent_mib` and `worker_mib`.
    """
    out, log, how, *command = sys.argv[1:]
    peaks: dict[int, int] = {}
    with open(log, "wb") as printed:  # noqa: PTH123
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG if how == "watch" else 0)
            if ended:
                break
            for pid in (process.pid, *descendants(process.pid)):
                # The last, not the largest: a fork shows its parent's until it runs a program.
                peaks[pid] = peak_kib(pid) or peaks.get(pid, 0)
            time.sleep(INTERVAL)
        for path in sorted(Path(out).rglob("*")):
            sync(path)
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    run = {
        "code": process.returncode,
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    if how == "watch":
        run["parent_mib"] = peaks.pop(process.pid, 0) / 1024
        run["worker_mib"] = max(peaks.values(), default=0) / 1024
    print(json.dumps(run))


def descendants(pid: int) -> list[int]:
    """The processes that pid and its children have started, those that are alive."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += child, *descendants(child)
    return found


def peak_kib(pid: int) -> int:
    """VmHWM of a process; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
