"""Seconds of pieces of work that take turns, so that what else a machine does meets all alike."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch


class Spread(NamedTuple):
    """What repeated measurements of one thing gave."""

    median: float
    low: float
    high: float
    n: int


def interleaved(
    works: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 2,
    seed: int = 0,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every work in every round, in an order drawn anew for each round.

    Waits for a GPU before and after, if there is one. After `seconds` no further round begins.
    """
    order, names = random.Random(seed), list(works)
    found: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(-warmup, rounds):
        if number > 0 and time.perf_counter() - began > seconds:
            break
        for name in order.sample(names, len(names)):
            took = seconds_of(works[name])
            if number >= 0:
                found[name].append(took)
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call, with what it left on the GPU's queue."""
    wait_for_gpu()
    began = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - began


def wait_for_gpu() -> None:
    """Nothing, where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> Spread:
    """Median, extremes and number."""
    return Spread(median(values), min(values), max(values), len(values))


def ratio(found: Mapping[str, list[float]], slow: str, fast: str) -> Spread:
    """How many times faster one was than the other, round by round."""
    return spread([s / f for s, f in zip(found[slow], found[fast], strict=True)])
