"""A batch that is not finite leaves no trace (on one of two ranks: test_two_ranks.py)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mpl_fast.algorithms import Algorithm
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import AlgorithmConfig, LearnerConfig, MPLConfig, SMPLConfig, UDAConfig
from mpl_fast.learner import Learner
from tests.algorithms import problems
from tests.algorithms.problems import as_dtype, assert_same, state

LEARNER = LearnerConfig(lr=0.1, warmup=0, ema=0.9, dropout=0.0, max_grad_norm=1.0)
ADAM = replace(LEARNER, optimizer="adamw", nesterov=False, max_grad_norm=0.0, ema=0.0)
CONFIGS: dict[str, AlgorithmConfig] = {
    "uda": UDAConfig(learner=LEARNER),
    "uda adamw": UDAConfig(learner=ADAM),
    "mpl": MPLConfig(teacher=LEARNER, student=LEARNER, baseline=0.9),
    "mpl exact": MPLConfig(teacher=LEARNER, student=LEARNER, feedback="exact"),
    "mpl per_example": MPLConfig(teacher=LEARNER, student=LEARNER, feedback="per_example"),
    "smpl": SMPLConfig(learner=LEARNER, feedback="off"),
}
# Counters of batches go on, the average follows, and the learning rate is that of the step.
CHANGES = ("tracked", "average", "lr")
# AdamW allocates its state in the first step, even if that is skipped.
ADAM_CHANGES = (*CHANGES, "state")


def network() -> nn.Module:
    return problems.network(norm=True).float()


def new(name: str) -> Algorithm:
    return problems.new(CONFIGS[name], network, steps=20)


def batch(seed: int) -> Batch:
    return as_dtype(problems.batch(seed, 4, 6), torch.float32)


@pytest.mark.parametrize("field", ["labeled", "weak", "strong"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "smpl"])
@pytest.mark.parametrize("before", [0, 2])
def test_the_step_is_skipped(name: str, value: float, field: str, before: int) -> None:
    """By every learner that has the image in its loss, also at the first step of all."""
    algorithm = new(name)
    for t in range(before):
        train_step(algorithm, batch(t), t)
    good, bad = state(algorithm), batch(9)
    getattr(bad, field)[1, 0, 2, 2] = value
    metrics = train_step(algorithm, bad, before)
    assert any(metrics[f"skipped/{n}"] == 1 for n in algorithm.learners)
    now = state(algorithm)
    ignore = ADAM_CHANGES if name == "uda adamw" and before == 0 else CHANGES
    for learner in algorithm.learners:
        if metrics[f"skipped/{learner}"]:
            assert_same(now[learner], good[learner], learner, ignore=ignore)
    assert_same(now["algorithm"], good["algorithm"])
    for t in range(before + 1, before + 3):  # and it goes on
        metrics = train_step(algorithm, batch(t), t)
        assert all(value.isfinite().all() for value in metrics.values())
    assert all(learner.finite() for learner in algorithm.learners.values())
    assert all(learner.skipped == 0 for learner in algorithm.learners.values())


def test_the_average_stays_finite_and_skipped_steps_are_counted() -> None:
    algorithm = new("uda")
    train_step(algorithm, batch(0), 0)
    bad = batch(1)
    bad.strong[0] = math.nan
    learner = algorithm.learners["learner"]
    for t in (1, 2, 3):
        train_step(algorithm, bad, t)
    assert learner.skipped == 3
    assert learner.average is not None
    assert all(v.isfinite().all() for v in learner.average.state_dict().values())


def test_a_step_whose_first_update_of_two_is_skipped_counts_as_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SMPL's second update is not skipped."""
    algorithm = new("smpl")
    learner = algorithm.learners["learner"]
    real, calls = learner.optimizer_step, iter(range(9))

    def with_nan_first() -> torch.Tensor:
        if next(calls) == 0:
            for parameter in learner.parameters:
                assert parameter.grad is not None
                parameter.grad.fill_(math.nan)
        return real()

    monkeypatch.setattr(learner, "optimizer_step", with_nan_first)
    assert train_step(algorithm, batch(0), 0)["skipped/learner"] == 1
    assert learner.skipped == 1
    assert train_step(algorithm, batch(1), 1)["skipped/learner"] == 0
    assert learner.skipped == 0


def test_a_statistic_alone_that_overflows_is_restored() -> None:
    """A later pass updates statistics without an optimizer step, as in a parity step."""
    learner = Learner(network(), LEARNER, steps=3)
    learner.begin_step(0)
    learner.backward_and_step(learner(batch(0).weak).square().mean())
    good = learner.network.state_dict()["1.running_mean"].clone()
    learner(torch.full((2, 3, 6, 6), math.inf))
    learner.end_step(0)
    assert torch.equal(learner.network.state_dict()["1.running_mean"], good)
