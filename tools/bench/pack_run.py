"""Runs a command until its output is on the disk and prints what that took, as JSON.

`pack_run.py OUT LOG COMMAND ...`: OUT is the folder that the command writes to, LOG the file for
what it prints. A script of its own, without PyTorch: the peak memory that the system reports of a
command begins with that of the process that started it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Prints the exit code, `wall` and `cpu` seconds, and `peak_mib` of the largest process."""
    out, log, *command = sys.argv[1:]
    with Path(log).open("wb") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed)
        _, status, usage = os.wait4(process.pid, 0)
        for path in sorted(Path(out).rglob("*")):
            sync(path)
        wall = time.perf_counter() - began
    code = process.returncode = os.waitstatus_to_exitcode(status)
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    print(json.dumps({"code": code, "wall": wall, "cpu": cpu, "peak_mib": peak}))


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
