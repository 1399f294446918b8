"""How long the GPU takes: graph replays over rotating inputs, host time, launches, memory."""

import math
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.bench_losses.contestants import Call
from tools.bench_losses.problems import Inputs, Shape, draw

REPLAYS = 30
CACHES = 4  # the inputs of a replay are so many times larger than the L2 cache
FEWEST, MOST = 8, 400  # sets of inputs: a replay must dwarf its launch; a graph has its limits
WALL_CALLS = 50


class Times(NamedTuple):
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float
    replays: int


def input_sets(shape: Shape) -> list[Inputs]:
    """Arguments so many and large that none is in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = math.ceil(CACHES * cache / shape.logit_bytes) + 1
    return [draw(shape, "cuda") for _ in range(min(max(count, FEWEST), MOST))]


def warm_up(call: Call, sets: list[Inputs]) -> None:
    """Compiles, and fills the allocator's cache, on a stream of its own as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in sets[:3]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def replayed(call: Call, sets: list[Inputs]) -> Times:
    """A graph of one call for each set, replayed; gradients are kept, so they rotate as well."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(x).gradient for x in sets]
    times = [t / len(kept) for t in event_times(graph.replay, REPLAYS)]
    fifths = quantiles(times, n=5)
    return Times(median(times), fifths[0], fifths[-1], len(times))


def event_times(work: Callable[[], Any], repetitions: int) -> list[float]:
    """Microseconds on the device of each repetition, after three for warming up."""
    found = []
    for number in range(-3, repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if number >= 0:
            found.append(start.elapsed_time(end) * 1e3)
    return found


def wall(call: Call, sets: list[Inputs]) -> float:
    """Microseconds of a call made by Python, back to back with others."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(WALL_CALLS):
        call(sets[number % len(sets)])
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / WALL_CALLS * 1e6


def launches(call: Call, x: Inputs) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call(x)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ())


def extra_memory(call: Call, x: Inputs) -> int:
    """Bytes that a call needs at its peak, besides its arguments."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = call(x)
    torch.cuda.synchronize()
    del done
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """GB/s of a copy on the device, bytes read and bytes written."""
    source = torch.randn(int(gigabytes * 1e9) // 4, device="cuda")
    target = torch.empty_like(source)
    microseconds = median(event_times(lambda: target.copy_(source), 20))
    return 2 * source.numel() * 4 / microseconds / 1e3


def launch_cost() -> dict[str, float]:
    """Microseconds of a kernel that does nothing worth mention: from Python, and in a graph."""
    x: Tensor = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(1000):
            x.add_(1.0)

    many()
    torch.cuda.synchronize()
    began = time.perf_counter()
    many()
    torch.cuda.synchronize()
    python = (time.perf_counter() - began) * 1e6 / 1000
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return {"python_us": python, "graph_node_us": median(event_times(graph.replay, 20)) / 1000}
