"""Interleaved timing: variants take turns, so that other load on the machine affects all alike."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

V = TypeVar("V")
T = TypeVar("T")
Work = Callable[[], Any]


def interleaved(
    variants: Mapping[str, V],
    timer: Callable[[V], T],
    *,
    rounds: int,
    warmup: int = 2,
    seed: int = 0,
    seconds: float = float("inf"),
) -> dict[str, list[T]]:
    """What `timer` returns for every variant in every round, in an order drawn anew for each round.

    The first `warmup` rounds are dropped. After `seconds` no further round begins, but one is
    always measured.
    """
    order, names = random.Random(seed), list(variants)
    found: dict[str, list[T]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(-warmup, rounds):
        if number > 0 and time.perf_counter() - began > seconds:
            break
        for name in order.sample(names, len(names)):
            measured = timer(variants[name])
            if number >= 0:
                found[name].append(measured)
    return found


def seconds_of(work: Work) -> float:
    """Wall time of one call, including the GPU work that it queued."""
    wait_for_gpu()
    began = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - began


def repeated(work: Work, times: int) -> Work:
    """The same work so many times back to back, without waiting for the GPU in between."""

    def all_of_them() -> None:
        for _ in range(times):
            work()

    return all_of_them


def wait_for_gpu() -> None:
    """Does nothing where there is no GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
