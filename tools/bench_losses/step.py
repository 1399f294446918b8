"""The losses' share of a whole training step: Meta Pseudo Labels, ResNet-50, synthetic images."""

import itertools
import random
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from mpl_fast import losses
from mpl_fast.algorithms import Algorithm
from mpl_fast.algorithms import build as build_algorithm
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig, MPLConfig
from mpl_fast.learner import Learner
from mpl_fast.models import build
from tools.bench_losses import cells, clock, contestants
from tools.bench_losses.cells import BF16, IMAGENET
from tools.bench_losses.problems import (
    LOSSES,
    UNLABELED_PER_LABELED,
    WITHOUT_GRADIENT,
    Shape,
)
from tools.bench_losses.progress import Progress

Json = dict[str, Any]
UNLABELED, PIXELS, STEPS = 128, 224, 10  # fits into 80 GB with room
WHO = (
    contestants.ONE_PASS,
    contestants.RECOMPUTE,
    contestants.COMPILED,
    contestants.PLAIN,
    contestants.EAGER,
)


def share(progress: Progress, order: random.Random) -> Json:
    """Milliseconds of a step, of its losses, and the share; the losses' cells are added.

    A step calls each loss once: the teacher's, the student's, the labeling, and the feedback with
    its two labeled losses. (The student's cell looks at labeled rows besides, a ninth of its rows,
    which a step leaves to the feedback.)
    """
    found: Json = {"network": "resnet50", "unlabeled": UNLABELED, "pixels": PIXELS, **_steps_ms()}
    torch.cuda.empty_cache()
    for loss in LOSSES:
        shape = Shape(loss, *IMAGENET, UNLABELED, BF16)
        who = [name for name in WHO if name in contestants.names(shape)]
        cells.measure(shape, who, progress, order)
    loss_ms = {name: _losses_ms(name, progress.result["cells"]) for name in WHO}
    eager = loss_ms[contestants.EAGER]
    if eager is None:
        return {**found, "losses_ms": loss_ms, "share": {}}
    others = found["step_ms_reference"] - eager
    shares = {name: ms / (others + ms) for name, ms in loss_ms.items() if ms is not None}
    return {**found, "losses_ms": loss_ms, "share": shares}


def _steps_ms() -> dict[str, float]:
    """Milliseconds of a whole step with either backend."""
    algorithm, batch, turn = _algorithm(), _batch(), itertools.count()
    found = {}
    choices: tuple[Literal["reference", "triton"], ...] = ("reference", "triton")
    for choice in choices:
        with losses.use(choice):
            times = clock.event_times(lambda: train_step(algorithm, batch, next(turn)), STEPS)
        found[f"step_ms_{choice}"] = median(times) / 1e3
    return found


def _losses_ms(name: str, measured: list[Json]) -> float | None:
    """Milliseconds on the device of all losses of a step; None if one of them has no number."""
    total = 0.0
    for loss in LOSSES:
        one_form = name == contestants.RECOMPUTE and loss in WITHOUT_GRADIENT
        who = contestants.ONE_PASS if one_form else name
        key = (loss, *IMAGENET, UNLABELED, "bfloat16", who)
        fields = ("loss", "classes", "width", "batch", "dtype", "contestant")
        mine = [c for c in measured if tuple(c[f] for f in fields) == key and "graph_us" in c]
        if not mine:
            return None
        total += mine[-1]["graph_us"]["median"] / 1e3
    return total


def _algorithm() -> Algorithm:
    torch.backends.cudnn.benchmark = True
    plain = LearnerConfig(lr=0.05, warmup=0)
    return build_algorithm(
        MPLConfig(teacher=plain, student=plain),
        lambda config: Learner(_network(), config, steps=10**6, device="cuda:0", bf16=True),
    )


def _network() -> nn.Module:
    """The same network, whoever has it."""
    try:
        return build("resnet50", 1000)
    except ImportError:  # no timm
        from torchvision.models import resnet50

        network: nn.Module = resnet50()
        return network


def _batch() -> Batch:
    labeled = UNLABELED // UNLABELED_PER_LABELED

    def images(count: int) -> torch.Tensor:
        x = torch.randn(count, 3, PIXELS, PIXELS, device="cuda", dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(1000, (count,), device="cuda")

    return Batch(
        images(labeled), labels(labeled), images(UNLABELED), images(UNLABELED), labels(UNLABELED)
    )
