"""The loss's share of a whole training step: Meta Pseudo Labels, ResNet-50, synthetic images."""

import itertools
from statistics import median
from typing import Any, Literal

import torch

from mpl_fast import losses
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig, MPLConfig
from mpl_fast.learner import Learner
from mpl_fast.models import build
from tools.bench_losses import clock, contestants
from tools.bench_losses.cells import BF16, IMAGENET, measure
from tools.bench_losses.problems import LOSSES, UNLABELED_PER_LABELED, Shape

Json = dict[str, Any]
UNLABELED, PIXELS, STEPS = 128, 224, 10  # fits into 80 GB with room
WHO = (contestants.EAGER, contestants.COMPILED, contestants.ONE_PASS, contestants.RECOMPUTE)


def share(cells: list[Json]) -> Json:
    """Milliseconds of a step, of its losses, and the share; cells that were missing are added."""
    found: Json = {"network": "resnet50", "unlabeled": UNLABELED, "pixels": PIXELS, **_steps_ms()}
    torch.cuda.empty_cache()
    loss_ms = {name: _losses_ms(name, cells) for name in WHO}
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


def _losses_ms(name: str, cells: list[Json]) -> float | None:
    """Milliseconds on the device of one teacher's, one student's loss and one labeling."""
    total = 0.0
    for loss in LOSSES:
        shape = Shape(loss, *IMAGENET, UNLABELED, BF16)
        who = contestants.ONE_PASS if (loss, name) == ("pseudo", contestants.RECOMPUTE) else name
        cell = _known(shape, who, cells)
        if cell is None:
            cell = measure(shape, who)
            cells.append(cell)
        if "graph_us" not in cell:
            return None
        total += cell["graph_us"]["median"] / 1e3
    return total


def _known(shape: Shape, name: str, cells: list[Json]) -> Json | None:
    """The cell, if it has been measured already."""
    for cell in cells:
        same = [cell[field] == getattr(shape, field) for field in ("loss", "classes", "batch")]
        wide = cell["width"] == shape.width and cell["dtype"] == "bfloat16"
        if all(same) and wide and cell["contestant"] == name:
            return cell
    return None


def _algorithm() -> MetaPseudoLabels:
    torch.backends.cudnn.benchmark = True
    plain = LearnerConfig(lr=0.05, warmup=0)
    return MetaPseudoLabels(
        MPLConfig(teacher=plain, student=plain),
        lambda config: Learner(
            build("resnet50", 1000), config, steps=10**6, device="cuda:0", bf16=True
        ),
    )


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
