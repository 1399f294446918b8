"""How long the GPU takes: graph replays over rotating inputs, host time, launches, memory."""

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.bench_losses.capture import captured
from tools.bench_losses.contestants import Call
from tools.bench_losses.problems import Inputs, Shape, draw

ROUNDS, WARM_ROUNDS = 30, 3
CACHES = 4  # the inputs of a replay are so many times larger than the L2 cache
FEWEST, ENOUGH, MOST = 3, 8, 200  # sets of inputs: a replay must dwarf its launch
SET_BYTES = 2 * 10**9  # above FEWEST sets, they take no more memory than this
FLUSHED = 256 * 2**20  # bytes written before each timing: no cache, no wait for the host
WALL_CALLS = 10

Work = Callable[[], Any]


class Times(NamedTuple):
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float
    replays: int


def input_sets(shape: Shape) -> list[Inputs]:
    """Arguments so many and large that none is in the cache when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [draw(shape, "cuda") for _ in range(set_count(shape.logit_bytes, l2))]


def set_count(logit_bytes: int, l2_bytes: int) -> int:
    """Several times the cache, and enough for a long replay, but not all of the memory."""
    wanted = max(math.ceil(CACHES * l2_bytes / logit_bytes) + 1, ENOUGH)
    return max(FEWEST, min(wanted, MOST, SET_BYTES // logit_bytes))


def warm_up(call: Call, sets: list[Inputs]) -> None:
    """Compiles, and fills the allocator's cache, on a stream of its own as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in sets[:3]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def graph_of(call: Call, sets: list[Inputs]) -> torch.cuda.CUDAGraph:
    """One call for each set; gradients are kept till its end, so they rotate as well."""
    kept: list[Tensor | None] = []
    return captured(lambda: kept.extend(call(x).gradient for x in sets))


def interleaved(
    works: Sequence[Work], order: random.Random, rounds: int = ROUNDS
) -> list[list[float]]:
    """Microseconds on the device of each piece of work, in rounds of one another in new order.

    What drifts, such as a clock that slows down as the chip gets warm, is then shared by all.
    """
    found: list[list[float]] = [[] for _ in works]
    for number in range(-WARM_ROUNDS, rounds):
        for turn in order.sample(range(len(works)), len(works)):
            microseconds = _event_time(works[turn])
            if number >= 0:
                found[turn].append(microseconds)
    return found


def summary(microseconds: Sequence[float], calls: int) -> Times:
    """Of one call, where each time is that of so many."""
    times = [t / calls for t in microseconds]
    fifths = quantiles(times, n=5)
    return Times(median(times), fifths[0], fifths[-1], len(times))


def event_times(work: Work, repetitions: int) -> list[float]:
    """Microseconds on the device of each repetition, after three for warming up."""
    return interleaved([work], random.Random(0), repetitions)[0]


def _event_time(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _memory_to_flush().zero_()  # the host has put everything in the queue before this ends
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


@cache
def _memory_to_flush() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


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
    return sum(is_launch(event) for event in profiler.events() or ())


def is_launch(event: Any) -> bool:
    """Whether the profiler saw it on the device, other than as the shadow of a host's region."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


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
    graph = captured(many)
    return {"python_us": python, "graph_node_us": median(event_times(graph.replay, 20)) / 1000}
