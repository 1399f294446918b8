"""Recipes and learning-rate schedules: one table each, every entry with its values."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from mpl_fast.config import RECIPES, AlgorithmConfig, LearnerConfig
from mpl_fast.config.learner import SCHEDULES

STEPS, DELAY, WARMUP = 40, 3, 5
SGD = torch.optim.SGD
BY_TORCH: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "cosine": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, STEPS - DELAY - WARMUP),
    "constant": lambda sgd: lr_scheduler.ConstantLR(sgd, factor=1.0),
    "step": lambda sgd: lr_scheduler.MultiStepLR(sgd, [m - DELAY - WARMUP for m in (12, 30)], 0.1),
    "exponential": lambda sgd: lr_scheduler.ExponentialLR(
        sgd, 0.1 ** (1 / (STEPS - DELAY - WARMUP))
    ),
    "onecycle": lambda sgd: lr_scheduler.OneCycleLR(sgd, 0.8, STEPS - DELAY, cycle_momentum=False),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_equal_those_of_torch(schedule: str) -> None:
    milestones = (12, 30) if schedule == "step" else ()
    config = LearnerConfig(
        lr=0.8, schedule=schedule, delay_steps=DELAY, warmup=WARMUP, milestones=milestones
    )
    rates = [config.lr_at(t, STEPS) for t in range(STEPS)]
    assert rates[:DELAY] == [0.0] * DELAY
    first = DELAY
    if SCHEDULES[schedule].warmup:
        assert rates[DELAY : DELAY + WARMUP] == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8])
        first += WARMUP
    sgd = SGD([torch.zeros(1)], lr=0.8)
    scheduler = BY_TORCH[schedule](sgd)
    for rate in rates[first:]:
        assert rate == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        scheduler.step()


def test_kekmodel_counts_the_delay_as_warm_up() -> None:
    config = LearnerConfig(lr=0.8, delay_steps=3, warmup=5, conventions="kekmodel")
    assert [config.lr_at(t, STEPS) for t in range(9)] == pytest.approx(
        [0.0, 0.0, 0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    )
    assert config.lr_at(STEPS + 1, STEPS) > config.lr_at(STEPS, STEPS)  # its cosine rises again


def test_every_algorithm_config_is_a_recipe_of_its_own() -> None:
    assert list(RECIPES.values()) == list(get_args(AlgorithmConfig))
    assert all(kind.recipe == name for name, kind in RECIPES.items())
