"""Measures what follows a backward pass: clipping, SGD with Nesterov momentum, moving average.

Variants: per tensor, lists of tensors (foreach), fused, and what training does. All must reach the
same weights within 1e-5 before any is timed. The limit is the time in which this machine, in the
same run, copies the bytes that no variant can avoid.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.config import LearnerConfig
from mpl_fast.learner import Learner
from mpl_fast.models import OWN
from tools.bench.clock import Work, interleaved, repeated, seconds_of
from tools.bench.count import launches, operators
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, choose_device, copies
from tools.bench.results import Row, count_row, one_line, ratios, spread

TINY = {"models": ["wrn_10_1"], "rounds": 2, "steps": 1}
STEPS = {"cpu": 1, "cuda": 20}
CONFIG = LearnerConfig(
    lr=0.01, weight_decay=1e-4, max_grad_norm=5.0, schedule="constant", warmup=0, ema=0.999
)
NORM = 10.0  # of the gradients, so that they are clipped
FACTORS = (1.0, 0.1, 1.0)  # of the gradients in the steps compared: clipped, not clipped, clipped
TOLERANCE = 1e-5
FIRST_STEP = 10**6  # the decay of the learner's average has warmed up by then
PER_TENSOR, OURS = "per tensor", "ours (Learner)"


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("optimizer", __doc__, arguments, measure, options, rounds=20, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    names = ["resnet50", "wrn_28_2"]
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")
    add("--steps", type=at_least(1), metavar="N", help="of one measurement (GPU 20, CPU 1)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device, options.steps = device.type, options.steps or STEPS[device.type]
    problems = [problem(model, device, options.seed) for model in options.models]
    copied = copies(device, small=options.smoke)
    report.more["limits"] = {"copy, bytes/s": copied._asdict()}
    report.claim = (
        f"one optimizer step, median of at most {options.rounds} interleaved rounds of "
        f"{options.steps} back to back; the share of the limit is that of a copy in the same run"
    )
    for number, one in enumerate(problems):
        variants = correct(one, BUILDERS, report)
        seconds = interleaved(
            {name: repeated(variant.work, options.steps) for name, variant in variants.items()},
            seconds_of,
            rounds=options.rounds,
            seed=options.seed,
            seconds=report.seconds_left(len(problems) - number),
        )
        of_one = {name: [s / options.steps for s in found] for name, found in seconds.items()}
        report.add(rows(one, variants, of_one, one.minimal_bytes() / copied.high))


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

    def load(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Takes other gradients: a variant may scale its own in place."""
        for mine, given in zip(self.gradients, gradients, strict=True):
            mine.copy_(given * factor)


Builder = Callable[[Problem], Variant]


def problem(model: str, device: torch.device, seed: int) -> Problem:
    """With random gradients of norm `NORM`. Raises `ConfigError` for an unknown name."""
    torch.manual_seed(seed)
    network = models.build(model, 10 if model in OWN else 1000)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = [torch.randn_like(p) for p in network.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return Problem(model, network, [g * (NORM / norm) for g in gradients], device)


def correct(
    problem: Problem, builders: Mapping[str, Builder], report: Report
) -> dict[str, Variant]:
    """The variants that reach the weights and averages of the one per tensor."""
    variants = dict[str, Variant]()
    right = stepped(problem, builders[PER_TENSOR])
    for name, build in builders.items():
        try:
            variant = stepped(problem, build)
            wrong = difference(variant, right)
        except Exception as error:  # an extension's, or that memory is full: the others go on
            wrong = one_line(error)
        if wrong:
            report.fail(f"{problem.name}: {name}", wrong)
        else:
            variants[name] = variant
    return variants


def stepped(problem: Problem, build: Builder) -> Variant:
    """A variant after the steps that are compared."""
    variant = build(problem)
    for factor in FACTORS:
        variant.load(problem.gradients, factor)
        variant.work()
    return variant


def difference(mine: Variant, right: Variant) -> str:
    """What is off; empty if nothing is."""
    for what in ("network", "average"):
        pairs = zip(floats(getattr(mine, what)), floats(getattr(right, what)), strict=True)
        off = float(torch.stack([(m - r).detach().abs().max() for m, r in pairs]).max())
        if not off <= TOLERANCE:  # also for NaN
            return f"wrong: its {what} is off by {off:.3g}"
    return ""


def rows(
    problem: Problem,
    variants: Mapping[str, Variant],
    seconds: Mapping[str, list[float]],
    limit: float,
) -> list[Row]:
    """Times, ratios to the one per tensor, operator calls, bytes and launches."""
    made = []
    for name, variant in variants.items():
        label = f"{problem.name}: {name}"
        milliseconds = spread([1e3 * s for s in seconds[name]])
        made.append(Row(label, milliseconds, "ms", limit=1e3 * limit))
        if name != PER_TENSOR and PER_TENSOR in seconds:
            gain = ratios(seconds, PER_TENSOR, name)
            made.append(Row(f"{label} / {PER_TENSOR}", gain, "times", "higher", steady=True))
        counts, least = operators(variant.work), problem.minimal_bytes() / 1e6
        made.append(count_row(f"{label}, operators", counts.calls, "calls"))
        made.append(count_row(f"{label}, memory", counts.bytes / 1e6, "MB", limit=least))
        if problem.device.type == "cuda":
            made.append(count_row(f"{label}, launches", launches(variant.work), "launches"))
    return made


def per_tensor(problem: Problem) -> Variant:
    """Loops over the parameters, as the common reference codes have it."""
    network, average = _copies(problem)
    averaged = list(zip(floats(average), floats(network), strict=True))
    copied = list(zip(counters(average), counters(network), strict=True))

    def averaging() -> None:
        for kept, new in averaged:
            kept.mul_(CONFIG.ema).add_(new, alpha=1.0 - CONFIG.ema)
        for kept, new in copied:
            kept.copy_(new)

    return _clipped(problem, network, average, _sgd(network), averaging)


def foreach(problem: Problem) -> Variant:
    """PyTorch's operators over lists of tensors."""
    network, average = _copies(problem)
    optimizer, averaging = _sgd(network, foreach=True), _averaging(average, network)
    return _clipped(problem, network, average, optimizer, averaging, foreach=True)


def fused(problem: Problem) -> Variant:
    """PyTorch's fused SGD, which clips and skips non-finite gradients inside of its one pass."""
    network, average = _copies(problem)
    parameters = list(network.parameters())
    optimizer: Any = _sgd(network, fused=True)
    for parameter in parameters:  # else a first step that is skipped would leave them undefined
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    averaging = _averaging(average, network)

    @torch.no_grad()
    def work() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        optimizer.grad_scale = ((norm + 1e-6) / CONFIG.max_grad_norm).clamp(min=1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        averaging()

    return _variant(problem, network, average, work)


def ours(problem: Problem) -> Variant:
    """What training does, which also keeps batch-norm statistics from non-finite values."""
    network, _ = _copies(problem)
    learner = Learner(network, CONFIG, steps=10 * FIRST_STEP, device=problem.device)
    learner.begin_step(0)
    steps = count(FIRST_STEP)
    assert learner.average is not None

    def work() -> None:
        learner.optimizer_step()
        learner.end_step(next(steps))

    return _variant(problem, learner.network, learner.average, work)


BUILDERS: dict[str, Builder] = {
    PER_TENSOR: per_tensor,
    "foreach": foreach,
    "fused": fused,
    OURS: ours,
}


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


def _copies(problem: Problem) -> tuple[nn.Module, nn.Module]:
    """Another network with the same weights, and its average."""
    network = copy.deepcopy(problem.network)
    return network, copy.deepcopy(network).requires_grad_(False)


def _clipped(
    problem: Problem,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaging: Work,
    *,
    foreach: bool = False,
) -> Variant:
    """PyTorch's clipping, the optimizer's step, the average."""
    parameters = list(network.parameters())

    @torch.no_grad()
    def work() -> None:
        nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm, foreach=foreach)
        optimizer.step()
        averaging()

    return _variant(problem, network, average, work)


def _variant(problem: Problem, network: nn.Module, average: nn.Module, work: Work) -> Variant:
    """`work` between setting the gradients and clearing them, as around a backward pass."""
    gradients, parameters = [g.clone() for g in problem.gradients], list(network.parameters())

    def whole() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        work()
        for parameter in parameters:
            parameter.grad = None

    return Variant(network, average, gradients, whole)


def _sgd(network: nn.Module, *, foreach: bool = False, fused: bool = False) -> torch.optim.SGD:
    return torch.optim.SGD(
        groups(network),
        CONFIG.lr,
        momentum=CONFIG.momentum,
        nesterov=CONFIG.nesterov,
        foreach=foreach,
        fused=fused,
    )


def _averaging(average: nn.Module, network: nn.Module) -> Work:
    kept, new, weight = floats(average), floats(network), 1.0 - CONFIG.ema
    copies, originals = counters(average), counters(network)

    def work() -> None:
        torch._foreach_lerp_(kept, new, weight)
        if copies:
            torch._foreach_copy_(copies, originals)

    return work
