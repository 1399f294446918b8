"""Measures what follows a backward pass: clipping, SGD with Nesterov momentum, moving average.

Variants: per tensor, lists of tensors (foreach), fused, and what training does. All must reach the
same weights within 1e-5 before any is timed. The limit is the time in which this machine, in the
same run, copies the bytes that no variant can avoid.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mpl_fast import models
from mpl_fast.config import LearnerConfig
from mpl_fast.learner import Learner
from mpl_fast.models import OWN
from tools.bench.clock import Work, repeated, seconds_of
from tools.bench.count import launches, operators
from tools.bench.harness import Report, run
from tools.bench.limits import COPY
from tools.bench.machine import DEVICES, choose_device
from tools.bench.results import Row, count_row, ratios, spread

TINY = {"models": ["wrn_10_1"], "rounds": 2}
STEPS = {"cpu": 1, "cuda": 20}  # of one measurement
CONFIG = LearnerConfig(
    lr=0.01, weight_decay=1e-4, max_grad_norm=5.0, schedule="constant", warmup=0, ema=0.999
)
NORM = 10.0  # of the gradients, so that they are clipped
FACTORS = (1.0, 0.1, 1.0)  # of the gradients in the steps compared: clipped, not clipped, clipped
TOLERANCE = 1e-5
FIRST_STEP = 10**6  # the decay of the learner's average has warmed up by then
PER_TENSOR, FOREACH, FUSED, OURS = "per tensor", "foreach", "fused", "ours (Learner)"
VARIANTS = (PER_TENSOR, FOREACH, FUSED, OURS)


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("optimizer", __doc__, arguments, measure, options, rounds=20, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add, names = parser.add_argument, ["resnet50", "wrn_28_2"]
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device, steps = device.type, STEPS[device.type]
    problems = [problem(model, device, options.seed) for model in options.models]
    copied = report.limits.best(COPY)
    report.claim = (
        f"one optimizer step, median of at most {options.rounds} interleaved rounds of "
        f"{steps} back to back; the share of the limit is that of a copy in the same run"
    )
    for number, one in enumerate(problems):
        works = correct(one, report)
        seconds = report.interleaved(
            works,
            lambda work: seconds_of(repeated(work, steps)) / steps,
            warmup=2,
            parts=len(problems) - number,
        )
        report.add(rows(one, works, seconds, one.minimal_bytes() / copied))


class Problem(NamedTuple):
    """A network in channels-last layout and gradients of its parameters."""

    name: str
    network: nn.Module
    gradients: list[Tensor]
    device: torch.device

    def minimal_bytes(self) -> int:
        """What has to be moved where the gradient's norm is known first.

        Of each parameter the gradient is read for the norm; gradient, weight and momentum are read,
        weight and momentum written; the average is read and written. Of each statistic the average
        is read and written, and the statistic read. All float32.
        """
        parameters = sum(p.numel() for p in self.network.parameters())
        statistics = sum(b.numel() for b in self.network.buffers() if b.is_floating_point())
        return 4 * (8 * parameters + 3 * statistics)


class Variant(NamedTuple):
    """`work` updates the weights and the average once with `gradients`."""

    network: nn.Module
    average: nn.Module
    gradients: list[Tensor]
    work: Work


def problem(model: str, device: torch.device, seed: int) -> Problem:
    """With random gradients of norm `NORM`. Raises `ConfigError` for an unknown name."""
    torch.manual_seed(seed)
    network = models.build(model, 10 if model in OWN else 1000)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = [torch.randn_like(p) for p in network.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return Problem(model, network, [g * (NORM / norm) for g in gradients], device)


def correct(problem: Problem, report: Report) -> dict[str, Work]:
    """The variants that reach the weights and averages of the one per tensor."""
    works, right = dict[str, Work](), stepped(problem, PER_TENSOR)
    for name in VARIANTS:
        with report.attempt(f"{problem.name}: {name}"):
            mine = stepped(problem, name)
            for what in ("network", "average"):
                pair = (floats(getattr(one, what)) for one in (mine, right))
                message = f"its {what} is wrong: {{}}".format
                assert_close(*pair, rtol=0.0, atol=TOLERANCE, msg=message)
            works[name] = mine.work
    return works


def stepped(problem: Problem, name: str) -> Variant:
    """A variant after the steps that are compared."""
    variant = build(problem, name)
    for factor in FACTORS:
        for mine, given in zip(variant.gradients, problem.gradients, strict=True):
            mine.copy_(given * factor)  # clipping has scaled them in place
        variant.work()
    return variant


def rows(
    problem: Problem,
    works: Mapping[str, Work],
    seconds: Mapping[str, list[float]],
    limit: float,
) -> list[Row]:
    """Times, ratios to the one per tensor, operator calls, bytes and launches."""
    made = []
    for name, work in works.items():
        label = f"{problem.name}: {name}"
        milliseconds = spread([1e3 * s for s in seconds[name]])
        made.append(Row(label, milliseconds, "ms", limit=1e3 * limit))
        if name != PER_TENSOR and PER_TENSOR in seconds:
            gain = ratios(seconds, PER_TENSOR, name)
            made.append(Row(f"{label} / {PER_TENSOR}", gain, "times", "higher", steady=True))
        counts, least = operators(work), problem.minimal_bytes() / 1e6
        made.append(count_row(f"{label}, operators", counts.launches, "calls"))
        made.append(count_row(f"{label}, memory", counts.bytes / 1e6, "MB", limit=least))
        if problem.device.type == "cuda":
            made.append(count_row(f"{label}, launches", launches(work), "launches"))
    return made


def build(problem: Problem, name: str) -> Variant:
    """One of `VARIANTS`, with a copy of the network.

    Its work sets the gradients and clears them, as around a backward pass.
    """
    network, gradients = copy.deepcopy(problem.network), [g.clone() for g in problem.gradients]
    average = copy.deepcopy(network).requires_grad_(False)
    if name == OURS:
        average, update = _ours(network, problem.device)
    else:
        update = _by_pytorch(network, average, name)
    parameters = list(network.parameters())

    def work() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        update()
        for parameter in parameters:
            parameter.grad = None

    return Variant(network, average, gradients, work)


def _ours(network: nn.Module, device: torch.device) -> tuple[nn.Module, Work]:
    """What training does, which also keeps batch-norm statistics from non-finite values."""
    learner = Learner(network, CONFIG, steps=10 * FIRST_STEP, device=device)
    learner.begin_step(0)
    steps = count(FIRST_STEP)
    assert learner.average is not None

    def update() -> None:
        learner.optimizer_step()
        learner.end_step(next(steps))

    return learner.average, update


def _by_pytorch(network: nn.Module, average: nn.Module, name: str) -> Work:
    """Clipping, SGD and average.

    Per tensor they are loops, as the common reference codes have them. Fused SGD clips, and skips
    non-finite gradients, inside of its one pass.
    """
    parameters = list(network.parameters())
    optimizer: Any = torch.optim.SGD(
        groups(network),
        CONFIG.lr,
        momentum=CONFIG.momentum,
        nesterov=CONFIG.nesterov,
        foreach=name == FOREACH,
        fused=name == FUSED,
    )
    kept, new, weight = floats(average), floats(network), 1.0 - CONFIG.ema
    copied, originals = counters(average), counters(network)

    @torch.no_grad()
    def update() -> None:
        if name == FUSED:
            norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).norm()  # type: ignore[misc]
            optimizer.grad_scale = ((norm + 1e-6) / CONFIG.max_grad_norm).clamp(min=1.0)
            optimizer.found_inf = (~norm.isfinite()).float()
        else:
            nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm, foreach=name == FOREACH)
        optimizer.step()
        if name == PER_TENSOR:
            for mine, other in zip(kept, new, strict=True):
                mine.mul_(CONFIG.ema).add_(other, alpha=weight)
            for mine, other in zip(copied, originals, strict=True):
                mine.copy_(other)
        else:
            torch._foreach_lerp_(kept, new, weight)
            if copied:
                torch._foreach_copy_(copied, originals)

    return update


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """Matrices and filters are decayed, norms and biases are not."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": CONFIG.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def floats(network: nn.Module) -> list[Tensor]:
    """What is averaged: parameters and statistics."""
    everything = [*network.parameters(), *network.buffers()]
    return [t for t in everything if t.is_floating_point()]


def counters(network: nn.Module) -> list[Tensor]:
    """What an average copies."""
    return [b for b in network.buffers() if not b.is_floating_point()]
