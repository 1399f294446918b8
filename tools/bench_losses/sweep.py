"""Is the table of launch configurations right? Blocks and warps tried at three shapes."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from mpl_fast.kernels.launch import Launch, launch_config
from tools.bench_losses import capture, clock, contestants
from tools.bench_losses.cells import BF16, IMAGENET, IMAGENET_21K
from tools.bench_losses.correctness import line
from tools.bench_losses.problems import Shape

Json = dict[str, Any]
SHAPES = [
    Shape("teacher", *IMAGENET, 32768, BF16),
    Shape("teacher", *IMAGENET_21K, 4096, BF16),
    Shape("student", *IMAGENET, 32768, BF16),
]
LONGEST_ROW = 8192  # columns; a longer one does not fit into registers
NOISE = 0.02  # the table is right if nothing is faster by more than this share


def candidates(width: int) -> list[Launch]:
    """A short row in one block; any in a loop over blocks that are shorter than it."""
    whole = max(16, 1 << (width - 1).bit_length())
    blocks = [Launch(whole, True, warps) for warps in (1, 2, 4, 8) if whole <= LONGEST_ROW]
    loops = product((1024, 2048, 4096, 8192), (2, 4, 8, 16))
    blocks += [Launch(b, False, w) for b, w in loops if b < width and 128 <= b // w <= 2048]
    return [launch_config(width), *(one for one in blocks if one != launch_config(width))]


@contextmanager
def forced(config: Launch) -> Iterator[None]:
    """Inside, every kernel is launched so: each module that launches has the name imported."""
    modules = [m for name, m in sys.modules.items() if name.startswith("mpl_fast.kernels.")]
    patched = [m for m in modules if vars(m).get("launch_config") is launch_config]
    for module in patched:
        vars(module)["launch_config"] = lambda width: config
    try:
        yield
    finally:
        for module in patched:
            vars(module)["launch_config"] = launch_config


def sweep(shape: Shape, order: random.Random) -> Json:
    """Microseconds of every candidate, and whether the table's is as fast as the fastest."""
    sets = clock.input_sets(shape)
    tried: list[Json] = []
    graphs = []
    for config in candidates(shape.width):
        tried.append(config._asdict())
        try:
            with forced(config):
                call = contestants.build(contestants.ONE_PASS, shape)
                clock.warm_up(call, sets)
                graphs.append((tried[-1], clock.graph_of(call, sets)))
        except Exception as error:  # such as a configuration without enough registers
            tried[-1]["failed"] = line(error)
            capture.require_device()
    found = clock.interleaved([graph.replay for _, graph in graphs], order)
    for (one, _), microseconds in zip(graphs, found, strict=True):
        times = clock.summary(microseconds, len(sets))
        one |= {"us": times.median, "p20": times.p20}
    return {"shape": str(shape), "table": launch_config(shape.width)._asdict(), **verdict(tried)}


def verdict(tried: list[Json]) -> Json:
    """The fastest of the candidates, of which the first is the table's."""
    timed = [one for one in tried if "us" in one]
    if not timed or timed[0] is not tried[0]:
        return {"tried": tried, "confirmed": False, "best": None}
    best = min(timed, key=lambda one: float(one["us"]))
    confirmed = timed[0]["us"] <= best["us"] * (1 + NOISE)
    return {"tried": tried, "confirmed": confirmed, "best": best}


def same_twice(shape: Shape, order: random.Random) -> float:
    """The share by which two measurements of the same thing differ: less is noise."""
    sets = clock.input_sets(shape)
    call = contestants.build(contestants.ONE_PASS, shape)
    clock.warm_up(call, sets)
    graphs = [clock.graph_of(call, sets) for _ in range(2)]
    found = clock.interleaved([graph.replay for graph in graphs], order)
    first, second = (clock.summary(times, len(sets)).median for times in found)
    return abs(first - second) / min(first, second)
