"""Measures batches a second in short rounds, one contestant after another, and CPU time besides."""

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tools.bench_input.contestants import Batches, Contestant

TICK = os.sysconf("SC_CLK_TCK")
Key = tuple[str, str]  # task and name


class Round(NamedTuple):
    """One measurement."""

    images_per_s: float
    cpu_us: float  # of this process and its children, an image


def rounds(
    contestants: Sequence[Contestant],
    *,
    batch: int,
    batches: int,
    repeats: int,
    seed: int,
    seconds: float = float("inf"),
) -> dict[Key, list[Round]]:
    """All contestants once in every round, in an order of its own, all of them open throughout.

    After `seconds` no further round begins.
    """
    order, began = random.Random(seed), time.perf_counter()
    running = [(contestant, contestant.open()) for contestant in contestants]
    for contestant, source in running:
        _check(contestant, next(source), batch)
    found: dict[Key, list[Round]] = {(one.task, one.name): [] for one in contestants}
    for number in range(repeats):
        if number and time.perf_counter() - began > seconds:
            break
        for contestant, source in order.sample(running, len(running)):
            _settle()
            measured = _measure(source, contestant.ahead + 1, batches, batch)
            found[contestant.task, contestant.name].append(measured)
    return found


def _check(contestant: Contestant, views: tuple[torch.Tensor, ...], batch: int) -> None:
    expected = 3 if contestant.task == "both" else 2
    if len(views) != expected or any(len(view) != batch for view in views):
        shapes = [tuple(view.shape) for view in views]
        raise ValueError(f"{contestant.name} gave {shapes} for {contestant.task} of {batch}")


def _measure(source: Batches, ahead: int, batches: int, batch: int) -> Round:
    """The batches that were prepared ahead are taken first, untimed."""
    for _ in range(ahead):
        next(source)
    _wait_for_gpu()
    cpu, began = _cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        next(source)
    _wait_for_gpu()
    wall, images = time.perf_counter() - began, batches * batch
    return Round(images / wall, 1e6 * (_cpu_seconds() - cpu) / images)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _settle(longest: float = 10.0) -> None:
    """Waits until nobody prepares batches any more: under 5 % of a core for 0.2 s."""
    deadline = time.perf_counter() + longest
    before = _cpu_seconds()
    while time.perf_counter() < deadline:
        time.sleep(0.2)
        now = _cpu_seconds()
        if now - before <= 0.02:
            return
        before = now


def _cpu_seconds() -> float:
    """Of this process and of its children that are running, such as a DataLoader's workers."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / TICK
