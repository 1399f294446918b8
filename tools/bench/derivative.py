"""Measures the derivative of logits along the weights, which `feedback: exact` takes in each step.

Variants: forward mode with the fused rule of batch norm and ReLU, with PyTorch's rule, and the
central difference, beside two plain forward passes, which is what a central difference cannot go
below. Each derivative is compared with PyTorch's before any is timed.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.testing import assert_close

from mpl_fast.learner import jvp
from mpl_fast.learner.batch_norm import batch_statistics
from tools.bench import backbone
from tools.bench.clock import repeated, seconds_of
from tools.bench.harness import Report, run
from tools.bench.machine import choose_device
from tools.bench.results import Row, ratios, spread

TINY = {"models": ["wrn_10_1"], "batch": 4, "rounds": 1}
FUSED, PYTORCH, CENTRAL = "forward, fused norms", "forward, PyTorch's norms", "central"
PASSES = "two forward passes"
OFF = {FUSED: 1e-3, PYTORCH: 1e-6, CENTRAL: 0.1}  # relative, of all numbers together

Work = Callable[[], Tensor]


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run(
        "derivative", __doc__, arguments, measure, backbone.problem_options, rounds=10, tiny=TINY
    )


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device = device.type
    repeats = backbone.STEPS[device.type]
    torch.manual_seed(options.seed)
    report.claim = (
        f"derivatives of networks in float32, median of at most {options.rounds} interleaved rounds"
    )
    for number, model in enumerate(options.models):
        problem = backbone.new_problem(model, device, options.batch)
        works = correct(problem, report)
        seconds = report.interleaved(
            works,
            lambda work: seconds_of(repeated(work, repeats)) / repeats,
            warmup=1,
            parts=len(options.models) - number,
        )
        report.add(rows(problem.label, seconds))


def correct(problem: backbone.Problem, report: Report) -> dict[str, Work]:
    """The variants, warmed up, that compute what PyTorch's rule does, and the plain passes."""
    network = problem.network.to(problem.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = problem.images()[0].contiguous(memory_format=torch.channels_last)
    weights = [p.detach() for p in network.parameters()]
    direction = [0.01 * torch.randn_like(w) * w.norm() / w.numel() ** 0.5 for w in weights]

    @torch.no_grad()
    def passes() -> Tensor:
        with batch_statistics(network):
            network(images)
            logits: Tensor = network(images)
        return logits

    def derivative(name: str) -> Tensor:
        one = jvp.WeightDerivative(network, "central" if name == CENTRAL else "forward")
        # Without a rule of ours in place, PyTorch's is taken.
        rule = mock.patch.object(jvp, "FusedNorms", nullcontext) if name == PYTORCH else None
        with batch_statistics(network), rule or nullcontext():
            return one.jvp(weights, direction, images)

    works: dict[str, Work] = {}
    expected = derivative(PYTORCH)
    for name, off in OFF.items():
        with report.attempt(f"{problem.label}: {name}"):
            error = (derivative(name) - expected).norm() / expected.norm()
            assert_close(error, torch.zeros_like(error), rtol=0.0, atol=off)
            works[name] = partial(derivative, name)
    return works | {PASSES: passes}


def rows(label: str, seconds: dict[str, list[float]]) -> list[Row]:
    """Milliseconds, and how many times faster the fused rule is than each other variant."""
    made = [
        Row(f"{label}: {name}", spread([1e3 * s for s in found]), "ms")
        for name, found in seconds.items()
    ]
    if FUSED not in seconds:
        return made
    for name in [one for one in seconds if one != FUSED]:
        gain = ratios(seconds, name, FUSED)
        made.append(Row(f"{label}: {name} / {FUSED}", gain, "times", "higher", steady=True))
    return made
