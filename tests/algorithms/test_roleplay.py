"""Role playing: which network is the student, and what is kept for it. (Its step:
test_definitions.py.)"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, ModelConfig, RolePlayConfig, RunConfig
from mpl_fast.data.manifest import Manifest, Split
from mpl_fast.training.auto import plain
from mpl_fast.training.build import build_algorithm
from tests.algorithms import problems

NAMES = ("first", "second")
LEARNER = replace(problems.LEARNER, warmup=0, max_grad_norm=0.0)
CONFIG = RolePlayConfig(
    teacher=LEARNER,
    student=LEARNER,
    consistency=ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=0.3),
    swap_every=2,
)


def batch(t: int) -> Batch:
    return problems.batch(t, 6, 9)


def role_play(config: RolePlayConfig) -> RolePlay:
    made = problems.new(config, lambda: problems.confident(problems.network()), steps=6)
    assert isinstance(made, RolePlay)
    return made


def test_a_period_of_0_is_an_epoch_of_the_unlabeled_images() -> None:
    model, by_epoch = ModelConfig(name="wrn_10_1"), replace(CONFIG, swap_every=0)
    config = RunConfig(algorithm=by_epoch, model=model, unlabeled_batch=7)
    manifest = Manifest(Path(), (), {"unlabeled": Split(60, (), Path(), Path(), 1)}, "")
    algorithm = build_algorithm(plain(config), manifest, 10, torch.device("cpu"))
    assert isinstance(algorithm, RolePlay)
    assert algorithm.period == 9  # 60 / 7, rounded up


def test_the_present_student_is_frozen_during_the_student_delay() -> None:
    algorithm = role_play(replace(CONFIG, student_delay_steps=3))
    seen = []
    for t in range(5):
        before = problems.state(algorithm)
        metrics = train_step(algorithm, batch(t), t)
        after = problems.state(algorithm)
        pairs = [[x[name]["network"]["0.weight"] for x in (before, after)] for name in NAMES]
        moved = [not torch.equal(*pair) for pair in pairs]
        seen.append([*moved, bool(metrics["feedback"] != 0)])
    # first moves, second moves, feedback: roles change before steps 2 and 4
    assert seen == [
        [True, False, False],
        [True, False, False],
        [False, True, False],
        [True, True, True],
        [True, True, True],
    ]


def test_a_frozen_student_gathers_no_momentum() -> None:
    """Its first step as teacher is that of a network never trained."""
    algorithm = role_play(replace(CONFIG, student_delay_steps=2))
    for t in range(2):
        train_step(algorithm, batch(t), t)
    states = algorithm.learners["second"].optimizer.state.values()
    assert states and not any(state["momentum_buffer"].any() for state in states)
    assert algorithm.learners["first"].optimizer.state
    train_step(algorithm, batch(2), 2)
    assert algorithm.learners["second"].optimizer.state


def test_each_student_has_its_own_baseline() -> None:
    algorithm = role_play(replace(CONFIG, baseline=0.5))
    assert set(algorithm.state) == {"baseline/first", "baseline/second"}
    for t in range(2):
        train_step(algorithm, batch(t), t)
    assert algorithm.state["baseline/second"] != 0 and algorithm.state["baseline/first"] == 0
    before = algorithm.state["baseline/second"].clone()
    train_step(algorithm, batch(2), 2)
    assert algorithm.state["baseline/first"] != 0 and algorithm.state["baseline/second"] == before


@pytest.mark.parametrize("mean_of", ["probability", "logits"])
def test_both_averaged_networks_are_evaluated_as_an_ensemble(
    mean_of: Literal["probability", "logits"],
) -> None:
    algorithm = role_play(replace(CONFIG, ensemble=mean_of))
    for t in range(3):
        train_step(algorithm, batch(t), t)
    images = batch(9).weak
    averages = [learner.average for learner in algorithm.learners.values()]
    with torch.no_grad():
        one, two = (average(images).float() for average in averages if average is not None)
    by_probability = (one.softmax(-1) + two.softmax(-1)) / 2
    by_logits = ((one + two) / 2).softmax(-1)
    assert not torch.allclose(by_probability, by_logits, atol=1e-4)
    expected = by_probability if mean_of == "probability" else by_logits
    torch.testing.assert_close(predict(algorithm, images), expected)
