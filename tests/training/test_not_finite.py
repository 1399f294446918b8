"""One batch that is not finite leaves no trace, on one rank or on two."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import Algorithm, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import AlgorithmConfig, LearnerConfig, MPLConfig, SMPLConfig, UDAConfig
from mpl_fast.learner import Learner
from tests.tiny_run import ROOT, environment

LEARNER = LearnerConfig(lr=0.1, warmup=0, ema=0.9, dropout=0.0, max_grad_norm=1.0)
ADAM = LearnerConfig(
    lr=0.1, warmup=0, optimizer="adamw", nesterov=False, max_grad_norm=0.0, dropout=0.0
)
CONFIGS: dict[str, AlgorithmConfig] = {
    "uda": UDAConfig(learner=LEARNER),
    "uda adamw": UDAConfig(learner=ADAM),
    "mpl": MPLConfig(teacher=LEARNER, student=LEARNER, baseline=0.9),
    "mpl exact": MPLConfig(teacher=LEARNER, student=LEARNER, feedback="exact"),
}


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


def new(name: str) -> Algorithm:
    torch.manual_seed(0)
    return algorithms.build(CONFIGS[name], lambda c: Learner(network(), c, steps=20))


def batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labeled, weak, strong = (torch.randn(n, 3, 6, 6, generator=g) for n in (4, 6, 6))
    return Batch(labeled, torch.arange(4) % 3, weak, strong, torch.zeros(6, dtype=torch.long))


def state(algorithm: Algorithm) -> dict[str, Any]:
    found = {n: learner.state_dict() for n, learner in algorithm.learners.items()}
    return copy.deepcopy({**found, "algorithm": algorithm.state})


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        for key in one:
            if key not in ("num_batches_tracked", "average") and "tracked" not in str(key):
                assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where


@pytest.mark.parametrize("field", ["labeled", "weak", "strong"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("before", [0, 2])
def test_the_step_is_left_out(name: str, value: float, field: str, before: int) -> None:
    """Of every learner that the image would have moved, also at the first step of all."""
    algorithm = new(name)
    for t in range(before):
        train_step(algorithm, batch(t), t)
    good, bad = state(algorithm), batch(9)
    getattr(bad, field)[1, 0, 2, 2] = value
    metrics = train_step(algorithm, bad, before)
    assert any(metrics[f"skipped/{n}"] == 1 for n in algorithm.learners)
    now = state(algorithm)
    for learner in algorithm.learners:
        if metrics[f"skipped/{learner}"]:
            assert_equal(good[learner], now[learner], learner)
    assert_equal(good["algorithm"], now["algorithm"])
    for t in range(before + 1, before + 3):  # and it goes on
        metrics = train_step(algorithm, batch(t), t)
        assert all(value.isfinite() for value in metrics.values())
    assert all(learner.finite() for learner in algorithm.learners.values())
    assert all(learner.skipped == 0 for learner in algorithm.learners.values())


def test_the_average_stays_finite_and_counts_go_on() -> None:
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


def test_the_first_of_two_updates_left_out_counts_as_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SMPL's second update would hide it."""
    torch.manual_seed(0)
    config = SMPLConfig(learner=LEARNER, feedback="off")
    algorithm = algorithms.build(config, lambda c: Learner(network(), c, steps=20))
    learner = algorithm.learners["learner"]
    real, calls = learner.optimizer_step, iter(range(9))

    def spoil_the_first() -> torch.Tensor:
        if next(calls) == 0:
            for parameter in learner.parameters:
                assert parameter.grad is not None
                parameter.grad.fill_(math.nan)
        return real()

    monkeypatch.setattr(learner, "optimizer_step", spoil_the_first)
    assert train_step(algorithm, batch(0), 0)["skipped/learner"] == 1
    assert learner.skipped == 1
    assert train_step(algorithm, batch(1), 1)["skipped/learner"] == 0
    assert learner.skipped == 0


def test_a_statistic_alone_that_overflows_is_put_back() -> None:
    """A later pass moves statistics without an update, as in one of the parity steps."""
    learner = Learner(network(), LEARNER, steps=3)
    learner.begin_step(0)
    learner.backward_and_step(learner(batch(0).weak).square().mean())
    good = learner.network.state_dict()["1.running_mean"].clone()
    learner(torch.full((2, 3, 6, 6), math.inf))
    learner.end_step(0)
    assert torch.equal(learner.network.state_dict()["1.running_mean"], good)


def test_a_bad_batch_on_one_rank_is_left_out_on_both(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [0, 1, 0]
    assert_equal(first["before"], first["after"])
    assert_equal(first["end"], second["end"])
    assert not torch.equal(
        first["end"]["learner"]["network"]["0.weight"],
        first["after"]["learner"]["network"]["0.weight"],
    )


RANKS = """
import math, sys, torch
from mpl_fast import distributed
from mpl_fast.algorithms.base import train_step
from tests.training.test_not_finite import batch, new, state

place = distributed.init("cpu")
algorithm, skipped = new("uda"), []
train_step(algorithm, batch(place.rank), 0)
skipped.append(int(algorithm.learners["learner"].skipped))
before, bad = state(algorithm), batch(5 + place.rank)
if place.rank == 1:
    bad.weak[0, 0, 0, 0] = math.nan
train_step(algorithm, bad, 1)
skipped.append(int(algorithm.learners["learner"].skipped))
after = state(algorithm)
train_step(algorithm, batch(7 + place.rank), 2)
skipped.append(int(algorithm.learners["learner"].skipped))
told = {"skipped": skipped, "before": before, "after": after, "end": state(algorithm)}
torch.save(told, f"{sys.argv[1]}/{place.rank}.pt")
distributed.shutdown()
"""
