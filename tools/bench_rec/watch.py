"""Runs a command and prints the peak memory of its process and of the largest of its workers.

`watch.py COMMAND ...` prints JSON as its last line: `parent_mib` and `worker_mib`, the peak
resident memory (VmHWM: shared pages are in it) as it was last seen, at most 10 ms before the end.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.01  # s


def main() -> None:
    """Run the command; end with its exit code."""
    process = subprocess.Popen(sys.argv[1:])
    # The last value of each, not the largest: a fork shows its parent's until it runs a program.
    peaks: dict[int, int] = {}
    try:
        while process.poll() is None:
            for pid in (process.pid, *descendants(process.pid)):
                peaks[pid] = peak_kib(pid) or peaks.get(pid, 0)
            time.sleep(INTERVAL)
    except BaseException:
        process.kill()
        raise
    parent = peaks.pop(process.pid, 0)
    worker = max(peaks.values(), default=0)
    print(json.dumps({"parent_mib": parent / 1024, "worker_mib": worker / 1024}))
    sys.exit(process.returncode)


def descendants(pid: int) -> list[int]:
    """Return the processes that pid and its children have started, those that are alive."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += child, *descendants(child)
    return found


def peak_kib(pid: int) -> int:
    """Return VmHWM of a process; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
