"""Measures networks by themselves: forward, cross-entropy and backward of synthetic images.

Variants: both memory layouts and precisions, eager and compiled. Loss and gradient norm of each are
compared with those of the first before any is timed. The limit of a rate is that of its kernels,
each by arithmetic or memory, at the machine's peak rates, measured in the same run by large
products, convolutions and copies (small networks may keep some bytes in a cache). Beside it are the
bounds that a dry run computes from shares of such rates.
"""

import argparse
import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mpl_fast import models
from mpl_fast.config.cards import Card
from mpl_fast.dry_run.roofline import BOUNDS, Bound, pass_seconds
from mpl_fast.dry_run.trace import trace
from mpl_fast.models import OWN
from tools.bench.clock import repeated, seconds_of
from tools.bench.harness import Report, at_least, run
from tools.bench.limits import BF16, COPY, FP32
from tools.bench.machine import DEVICES, choose_device
from tools.bench.results import Row, ratios, spread

TINY = {"models": ["wrn_10_1"], "batch": 4, "rounds": 1}
SMALL, LARGE = 32, 224  # pixels a side, of the networks for CIFAR and of all others
BATCHES = {("cpu", SMALL): 64, ("cpu", LARGE): 16, ("cuda", SMALL): 512, ("cuda", LARGE): 256}
STEPS = {"cpu": 1, "cuda": 10}
OFF = {"loss": 0.05, "gradient norm": 0.25}  # bfloat16 and other dropout masks stay well below
TARGET, TARGET_MODEL, TARGET_GPUS = 3000.0, "resnet50", ("H100", "H200")
PEAK = Bound(compute=1.0, memory=1.0, links=1.0, kernel=0.0, launch=0.0)

Step = Callable[[], Tensor]


class Variant(NamedTuple):
    """A name, and how it runs the step."""

    name: str
    channels_last: bool = True
    bf16: bool = False
    compiled: bool = False


BASE = Variant("eager NCHW fp32", channels_last=False)
BEST = Variant("compile NHWC bf16", bf16=True, compiled=True)
VARIANTS = (
    BASE,
    Variant("eager NHWC fp32"),
    Variant("eager NHWC bf16", bf16=True),
    Variant("compile NHWC fp32", compiled=True),
    BEST,
)


class Problem(NamedTuple):
    """A network and its images."""

    model: str
    network: nn.Module
    image_size: int
    batch: int
    device: torch.device

    @property
    def label(self) -> str:
        """The beginning of its rows' names."""
        return f"{self.model}, {self.batch} x {self.image_size} px"

    def images(self) -> tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` float32 and labels ``(N,)`` int64, on the device."""
        shape = (self.batch, 3, self.image_size, self.image_size)
        labels = torch.arange(self.batch, device=self.device) % 10  # every network has these
        return torch.randn(shape, device=self.device), labels


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("backbone", __doc__, arguments, measure, options, rounds=10, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    problem_options(parser)
    parser.add_argument("--eager", action="store_true", help="leave out what compiles for minutes")


def problem_options(parser: argparse.ArgumentParser) -> None:
    """Networks, images and device."""
    add = parser.add_argument
    names, sizes = ["resnet50", "wrn_28_2"], "images (GPU 256, or 512 small ones; CPU 16, 64)"
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    # A batch norm cannot normalize one image.
    add("--batch", type=at_least(2), metavar="N", help=sizes)
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device = device.type
    repeats = STEPS[device.type]
    torch.manual_seed(options.seed)
    problems = [new_problem(model, device, options.batch) for model in options.models]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    fp32, bf16, copied = map(report.limits.best, (FP32, BF16, COPY))
    card = Card(name, bf16, fp32, memory=0.0, bandwidth=copied, links=1.0)
    variants = [one for one in VARIANTS if not (options.eager and one.compiled)]
    report.claim = (
        f"training steps of the networks alone, median of at most {options.rounds} interleaved "
        "rounds; the share of a limit is that of what this machine did in the same run"
    )
    for number, one in enumerate(problems):
        # The compiled forms of another network would count towards the limit of recompilations.
        torch._dynamo.reset()
        steps = correct(one, variants, report)
        with report.attempt(f"{one.label}: all of them"):  # may need more memory than each did
            seconds = report.interleaved(
                steps,
                lambda step: seconds_of(repeated(step, repeats)) / repeats,
                warmup=1,
                parts=len(problems) - number,
            )
            for variant in variants:
                if variant.name in seconds:
                    report.add(time_rows(one, variant, seconds, card))


def new_problem(model: str, device: torch.device, batch: int | None = None) -> Problem:
    """With the usual numbers for the network and the device. Raises `ConfigError` for a name."""
    size, classes = (SMALL, 10) if model in OWN else (LARGE, 1000)
    batch = batch or BATCHES[device.type, size]
    return Problem(model, models.build(model, classes), size, batch, device)


def correct(problem: Problem, variants: Sequence[Variant], report: Report) -> dict[str, Step]:
    """Steps, warmed up, of the variants that compute what the first one does."""
    images, labels = problem.images()
    right: list[Tensor] = []  # the first one's loss and gradient norm
    steps: dict[str, Step] = {}
    for variant in variants:
        with report.attempt(f"{problem.label}: {variant.name}"):
            network = copy.deepcopy(problem.network)
            step = prepared(variant, network, images, labels)
            loss = step()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            found = [loss, nn.utils.get_total_norm(gradients)]
            right = right or found
            for (what, off), mine, first in zip(OFF.items(), found, right, strict=True):
                message = f"its {what} is wrong: {{}}".format
                assert_close(mine, first, rtol=off, atol=0.0, msg=message)
            steps[variant.name] = step
        if problem.device.type == "cuda":
            gc.collect()  # what compilers leave refers to itself, and holds memory of the GPU
            torch.cuda.empty_cache()
    return steps


def prepared(variant: Variant, network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, cross-entropy and backward of one batch; the step returns the loss.

    Takes the network over. `images` are ``(N, 3, H, W)`` float32, `labels` ``(N,)``.
    """
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    network.to(images.device, memory_format=layout).train()  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    if variant.compiled:
        # A break in the graph would be an error: it is part of what is claimed that there is none.
        network.compile(dynamic=False, fullgraph=True)

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=variant.bf16):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    return step


def time_rows(
    problem: Problem,
    variant: Variant,
    seconds: Mapping[str, list[float]],
    card: Card,
) -> list[Row]:
    """Images a second beside their limit and target; the ratio to the first variant; and of times
    to the bounds for this card: to the optimistic one at least 1, to the other at most 1."""
    name, measured = f"{problem.label}: {variant.name}", seconds[variant.name]
    network = copy.deepcopy(problem.network).to("cpu")
    passes = trace(network, problem.image_size, bf16=variant.bf16, compiled=variant.compiled)
    kernels = [*passes.forward, *passes.backward]

    def computed(bound: Bound) -> float:
        return pass_seconds(kernels, problem.batch, variant.bf16, card, bound)

    meant = variant == BEST and problem.model == TARGET_MODEL
    aim = TARGET if meant and any(gpu in card.name for gpu in TARGET_GPUS) else None
    rates, limit = spread([problem.batch / s for s in measured]), problem.batch / computed(PEAK)
    rows = [Row(name, rates, "img/s", "higher", limit=limit, target=aim)]
    if variant.name != BASE.name and BASE.name in seconds:
        gain = ratios(seconds, BASE.name, variant.name)
        rows.append(Row(f"{name} / {BASE.name}", gain, "times", "higher", steady=True))
    for word, bound in zip(("optimistic", "pessimistic"), BOUNDS, strict=True):
        expected = computed(replace(bound, kernel=0.0))  # those are of GPUs
        rows.append(
            Row(f"{name} / {word} bound", spread([s / expected for s in measured]), "times")
        )
    return rows
