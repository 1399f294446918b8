"""The machine: its device, versions and commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mpl_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("auto", "cpu", "cuda")
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "torchvision")
PEERS = ("liger-kernel", "apex", "spdl", "simplejpeg", "opencv-python-headless")


def choose_device(name: str) -> torch.device:
    """One of `DEVICES`; auto is CUDA where there is a GPU.

    TF32 and cuDNN's search for the fastest convolution are on, as in training. Raises `ConfigError`
    for cuda where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu, or auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def describe(commit: str | None = None) -> dict[str, Any]:
    """CPU, GPU, versions, load and commit; `commit` is used where there is no git."""
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES + PEERS if (v := _version(name))},
        "commit": commit or output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if not torch.cuda.is_available():
        return {**found, "gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _nvidia("driver_version"),
        "clocks": _nvidia("clocks.sm,clocks.max.sm,power.limit"),
    }


def _nvidia(query: str) -> str:
    return output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """What a command prints; "unknown" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
