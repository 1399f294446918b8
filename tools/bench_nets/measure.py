"""The contestants of one network: made ready, compared with the first one, timed in turns."""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from tools.bench.clock import interleaved
from tools.bench.report import Row
from tools.bench_losses.capture import require_device
from tools.bench_nets.contestants import Contestant, Step, peak_bytes, prepared
from tools.bench_nets.rows import Limits, peak_row, time_rows, work_rows
from tools.bench_nets.setting import Setting
from tools.bench_nets.work import counted

LOSS_OFF, NORM_OFF = 0.05, 0.25  # bfloat16 and other dropout masks stay well below


class Outcome(NamedTuple):
    """Rows, and why contestants are missing or wrong."""

    rows: list[Row]
    failed: dict[str, str]


def measure(
    setting: Setting,
    network: nn.Module,
    who: Sequence[Contestant],
    limits: Limits,
    seconds: float = float("inf"),
) -> Outcome:
    """Rows of one network; after `seconds` no further round begins."""
    began, work = time.perf_counter(), counted(network, setting.image_size)
    # The compiled forms of another network would count towards the limit of recompilations.
    torch._dynamo.reset()
    ready = _Ready({}, work_rows(setting, work), {})
    _prepare(setting, network, who, ready)
    times: dict[str, list[float]] = {}
    try:
        times = interleaved(
            {name: _repeated(step, setting.steps) for name, step in ready.steps.items()},
            rounds=setting.rounds,
            warmup=1,
            seed=setting.seed,
            seconds=seconds - (time.perf_counter() - began),
        )
    except torch.OutOfMemoryError as error:  # all together may need more than each did
        ready.failed["all of them"] = _line(error)
    rows = [time_rows(setting, one, times, work, limits) for one in who if one.name in times]
    failed = {f"{setting.label}: {name}": why for name, why in ready.failed.items()}
    return Outcome(sum(rows, ready.rows), failed)


class _Ready(NamedTuple):
    """Steps by their contestants' names, and what was found on the way."""

    steps: dict[str, Step]
    rows: list[Row]
    failed: dict[str, str]


def _prepare(
    setting: Setting, network: nn.Module, who: Sequence[Contestant], ready: _Ready
) -> None:
    """What fails or is wrong is told and not timed."""
    images, labels = setting.images()
    first: tuple[float, float] | None = None
    for one in who:
        mine = copy.deepcopy(network)
        try:
            step = prepared(one, mine, images, labels)
            sign = _sign(step, mine)
            first = first or sign
            if wrong := difference(first, sign):
                ready.failed[one.name] = wrong
                continue
            if setting.device.type == "cuda" and not one.graphed:  # whose memory stays taken
                ready.rows.append(peak_row(setting, one, peak_bytes(step, mine)))
            ready.steps[one.name] = step
        except Exception as error:  # a compiler's, or that memory is full: the others go on
            ready.failed[one.name] = _line(error)
        _tidy(setting.device)


def _sign(step: Step, network: nn.Module) -> tuple[float, float]:
    """Loss and gradient norm: what tells that a contestant computes another step."""
    loss = float(step())
    gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return loss, float(torch.stack(gradients).norm())


def difference(right: tuple[float, float], mine: tuple[float, float]) -> str:
    """What is off in loss and gradient norm; empty if nothing is."""
    names, most = ("loss", "gradient norm"), (LOSS_OFF, NORM_OFF)
    for name, a, b, share in zip(names, right, mine, most, strict=True):
        if not abs(a - b) <= share * abs(a):  # also for NaN
            return f"wrong: its {name} is {b:.6g}, that of the first {a:.6g}"
    return ""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _tidy(device: torch.device) -> None:
    """Gives back what a failure or a preparation has left. Raises if the GPU is lost."""
    if device.type == "cuda":
        require_device()
        gc.collect()  # what compilers leave refers to itself, and holds memory of the GPU
        torch.cuda.empty_cache()


def _repeated(step: Step, steps: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(steps):
            step()

    return work
