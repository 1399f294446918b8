"""Counts what a step puts on a GPU's queue, or, without one, the operators that it calls."""

from collections.abc import Callable
from typing import Any

import torch

from tools.bench_losses.clock import is_launch
from tools.bench_losses.counts import Counter


def launches(step: Callable[[], Any], device: torch.device) -> int:
    """Kernels, copies and fills of a warm step; on a CPU operators other than views.

    On a CPU a compiled network's kernels are no operators: measure eager ones there.
    """
    if device.type == "cuda":
        return _on_gpu(step)
    with Counter() as counter:
        step()
    return int(counter.launches)


def _on_gpu(step: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(is_launch(event) for event in profiler.events() or ())
