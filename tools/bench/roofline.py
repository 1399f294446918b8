"""Compares training steps of networks with the time that a dry run would compute for this machine.

The machine's peak rates are measured in the same run, by large products, convolutions and copies.
The limit of a step is its time at these rates; a dry run computes an optimistic and a pessimistic
bound from shares of them.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from mpl_fast.config.cards import Card
from mpl_fast.dry_run.roofline import BOUNDS, Bound, pass_seconds
from mpl_fast.dry_run.trace import trace
from tools.bench.backbone import Problem, Variant, new_problem, prepared
from tools.bench.clock import repeated, seconds_of
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, choose_device, copies, flops
from tools.bench.results import Row, spread

TINY = {"models": ["wrn_10_1"], "batch": 4, "rounds": 1}
STEPS = {"cpu": 1, "cuda": 10}
PEAK = Bound(compute=1.0, memory=1.0, links=1.0, kernel=0.0, launch=0.0)
VARIANTS = (
    Variant("eager fp32"),
    Variant("eager bf16", bf16=True),
    Variant("compile bf16", bf16=True, compiled=True),
)


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("roofline", __doc__, arguments, measure, options, rounds=7, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    names = ["wrn_28_2", "resnet50", "efficientnet_b0"]
    shown = " ".join(names)
    parser.add_argument("--models", nargs="+", default=names, metavar="NAME", help=f"({shown})")
    parser.add_argument("--eager", action="store_true", help="leave out what compiles for minutes")
    parser.add_argument("--batch", type=at_least(2), metavar="N", help="images")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device, repeats = device.type, STEPS[device.type]
    torch.manual_seed(options.seed)
    fp32, bf16 = (
        flops(device, dtype, small=options.smoke) for dtype in (torch.float32, torch.bfloat16)
    )
    moved = copies(device, small=options.smoke)
    limits = {"fp32 FLOP/s": fp32, "bf16 FLOP/s": bf16, "copy, bytes/s": moved}
    report.more["limits"] = {name: one._asdict() for name, one in limits.items()}
    card = Card("this machine", bf16.high, fp32.high, 0.0, moved.high, 1.0)
    report.claim = (
        f"training steps of the networks alone, median of at most {options.rounds} interleaved "
        "rounds, beside what is computed from rates that this machine reached in the same run"
    )
    variants = [one for one in VARIANTS if not (options.eager and one.compiled)]
    for number, name in enumerate(options.models):
        torch._dynamo.reset()
        problem = new_problem(name, device, options.batch)
        steps = {}
        for variant in variants:
            with report.attempt(f"{problem.label}: {variant.name}"):
                network = copy.deepcopy(problem.network)
                steps[variant.name] = prepared(variant, network, *problem.images())
        seconds = report.interleaved(
            steps,
            lambda step: seconds_of(repeated(step, repeats)) / repeats,
            warmup=1,
            parts=len(options.models) - number,
        )
        for variant in variants:
            if variant.name in seconds:
                report.add(rows(problem, variant, seconds[variant.name], card))


def rows(problem: Problem, variant: Variant, seconds: list[float], card: Card) -> list[Row]:
    """A step's time, whose limit is the one at the card's peak rates, and its ratio to both bounds,
    between which the dry run expects it: the first is at least 1, the second at most 1."""
    network = copy.deepcopy(problem.network).to("cpu")
    passes = trace(network, problem.image_size, bf16=variant.bf16, compiled=variant.compiled)

    def computed(bound: Bound) -> float:
        kernels = [*passes.forward, *passes.backward]
        return pass_seconds(kernels, problem.batch, variant.bf16, card, bound)

    name = f"{problem.label}: {variant.name}"
    found = [Row(name, spread([1000 * s for s in seconds]), "ms", limit=1000 * computed(PEAK))]
    for word, bound in zip(("optimistic", "pessimistic"), BOUNDS, strict=True):
        limit = computed(replace(bound, kernel=0.0))  # those are of GPUs
        found.append(Row(f"{name} / {word} bound", spread([s / limit for s in seconds]), "times"))
    return found
