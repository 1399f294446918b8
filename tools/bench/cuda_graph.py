"""CUDA graphs: what can be captured, and captures whose failure does not affect what follows."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from tools.bench.results import one_line


class DeviceLostError(RuntimeError):
    """The GPU no longer computes correctly: nothing after this can be measured."""


def synchronization(work: Callable[[], Any]) -> str:
    """Why `work` cannot be captured, found by running it: "" if nothing in it synchronizes."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return ""


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The graph of `work`, captured on a stream of its own, with memory and generator of its own.

    PyTorch leaves a capture that fails half open: its stream is still the current one, its pool
    still takes allocations, and the random generator still refuses to be used outside of it.
    """
    torch.cuda.synchronize()
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            work()
    except BaseException:
        torch.cuda.set_stream(before)
        with suppress(RuntimeError):  # raised if it is closed already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    finally:
        generator.graphsafe_set_state(state)
    return graph


def require_device(device: str = "cuda") -> None:
    """Raises DeviceLostError unless kernels and random numbers work, and no capture is open."""
    try:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the current stream is still captured")
        total = float((torch.rand(64, device=device) * 0.0 + 1.0).sum())  # waits for it
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLostError(f"the device is unusable: {one_line(error)}") from error
    if total != 64.0:
        raise DeviceLostError(f"the device is unusable: 64 ones add up to {total}")
