"""The machine: its device, versions and commit, and its measured FLOP/s and bytes/s."""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mpl_fast.errors import ConfigError
from tools.bench.clock import seconds_of
from tools.bench.results import Spread, spread

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("auto", "cpu", "cuda")
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "torchvision")
PEERS = ("liger-kernel", "apex", "spdl", "simplejpeg", "opencv-python-headless")
ROUNDS, WARMUP = 10, 3


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


def flops(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Spread:
    """FLOP/s of products of square matrices, or of a convolution if that is faster.

    Of random numbers: zeros would need less power, so a GPU would keep a clock that no training
    sees. `small` shows only that it runs. (Some CPUs have slower libraries for products than for
    convolutions.)
    """
    return max(_products(device, dtype, small), _convolutions(device, dtype, small))


def copies(device: torch.device, *, small: bool = False) -> Spread:
    """Bytes/s of copies too large for any cache; bytes read and bytes written both count."""
    size, calls = (2 * 10**9, 5) if device.type == "cuda" else (256 * 10**6, 1)
    size = 10**6 if small else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(calls):
            target.copy_(source)

    return _rate(work, 2.0 * size * calls)


def _products(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    size, calls = (8192, 10) if device.type == "cuda" else (2048, 1)
    size = 256 if small else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty(size, size, device=device, dtype=dtype)

    def work() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=c)

    return _rate(work, 2.0 * size**3 * calls)


def _convolutions(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    """3 x 3 on 28 x 28 pixels of 256 channels, NHWC."""
    images, channels, side = (256, 256, 28) if device.type == "cuda" else (16, 256, 28)
    images, channels, side = (1, 16, 8) if small else (images, channels, side)
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))

    def work() -> None:
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, padding=1)

    return _rate(work, 2.0 * 9 * channels * channels * images * side * side)


def _rate(work: Callable[[], None], amount: float) -> Spread:
    for _ in range(WARMUP):
        work()
    return spread([amount / seconds_of(work) for _ in range(ROUNDS)])


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
