"""What a result depends on besides its config: versions, devices and commit of each session."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mpl_fast import atomic
from mpl_fast.untrusted import json_value

PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "numpy")


def record(file: Path) -> str:
    """Adds this session to env.json; returns a warning if the session before had another git
    commit, or an empty text."""
    sessions, present = _sessions(file), environment()
    atomic.write_json(file, present | {"earlier_sessions": sessions})
    before, now = sessions[-1].get("git_commit") if sessions else None, present["git_commit"]
    if not before or not now or before == now:
        return ""
    return f"resumed with another program: the git commit was {before} and is {now}"


def _sessions(file: Path) -> list[Any]:
    """Earlier sessions listed in env.json, oldest first; none if the file is unreadable."""
    try:
        latest = json_value(file.read_bytes())
        return [*latest.pop("earlier_sessions"), latest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def environment() -> dict[str, Any]:
    """Versions, devices and git commit: what a result depends on besides its config."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **_versions(),
            "cuda": torch.version.cuda,
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [f"CPU ({platform.machine()}, {os.cpu_count()} cores)"],
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": _commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of this file's checkout, ending in -dirty if files were changed since."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
