"""The machine and the versions that a measurement was made with."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "opencv-python-headless", "simplejpeg")
ROOT = Path(__file__).resolve().parents[2]


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return what can be found out; the file system is that of folder."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_line("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "filesystem": _output("df", "--output=fstype", str(folder)).split("\n")[-1],
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "tar": _output("tar", "--version").split("\n")[0],
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "0"


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
