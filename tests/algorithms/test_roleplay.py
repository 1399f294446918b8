"""Role playing: which network is the student, and what is kept for it. (Its step:
test_definitions.py.)"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, RolePlayConfig
from mpl_fast.config.command_line import parse
from mpl_fast.data.manifest import read_manifest
from mpl_fast.learner import Learner
from mpl_fast.training.build import build_algorithm
from tests.algorithms import problems
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments

STEPS = 6
# Different in everything that a network could leave behind in a role.
FIRST = LearnerConfig(
    lr=0.2, warmup=3, momentum=0.9, ema=0.9, weight_decay=0, max_grad_norm=0, dropout=0
)
SECOND = replace(FIRST, lr=0.1, warmup=0, momentum=0.5, ema=0.5)
CONFIG = RolePlayConfig(
    teacher=FIRST,
    student=SECOND,
    consistency=ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=0.3),
    swap_every=2,
)


def batch(t: int) -> Batch:
    return problems.batch(t, 6, 9)


def role_play(config: RolePlayConfig) -> RolePlay:
    """Without batch norm, so that views may be passed one by one."""
    made = problems.new(
        config,
        lambda: problems.confident(problems.network()),
        steps=STEPS,
        context=AlgorithmContext(),
    )
    assert isinstance(made, RolePlay)
    return made


def test_roles_follow_from_the_step() -> None:
    algorithm = role_play(replace(CONFIG, swap_every=3))
    first, second = algorithm.learners.values()
    teacher_is_first = [algorithm.roles(t)[0] is first for t in range(9)]
    assert teacher_is_first == [True] * 3 + [False] * 3 + [True] * 3
    assert all({*algorithm.roles(t)} == {first, second} for t in range(9))


def test_a_period_of_0_is_an_epoch_of_the_unlabeled_images(tiny_rec: Path, tmp_path: Path) -> None:
    options = arguments(tmp_path / "run", tiny_rec, recipe="mpl_roleplay")
    config = parse([*options, "--algorithm.swap-every", "0", "--unlabeled-batch", "7"])
    manifest = read_manifest(str(tiny_rec))
    algorithm = build_algorithm(config, manifest, 10, torch.device("cpu"))
    assert isinstance(algorithm, RolePlay)
    assert manifest.splits["unlabeled"].records == 60
    assert algorithm.period == 9  # 60 / 7, rounded up


def moved(before: dict[str, Tensor], learner: Learner) -> bool:
    now = learner.network.state_dict()
    return any(not torch.equal(now[key], value) for key, value in before.items())


def test_the_present_student_is_frozen_during_the_student_delay() -> None:
    algorithm = role_play(replace(CONFIG, student_delay_steps=3))
    seen = []
    for t in range(5):
        before = [copy.deepcopy(x.network.state_dict()) for x in algorithm.learners.values()]
        metrics = train_step(algorithm, batch(t), t)
        pairs = zip(before, algorithm.learners.values(), strict=True)
        seen.append(
            [*(moved(old, learner) for old, learner in pairs), bool(metrics["feedback"] != 0)]
        )
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


def test_resumed_in_the_middle_of_a_period_equals_no_stop() -> None:
    uninterrupted = role_play(CONFIG)
    saved = {}
    for t in range(STEPS):
        if t == 3:  # the second network has been the teacher for one step
            saved = {k: copy.deepcopy(v.state_dict()) for k, v in uninterrupted.learners.items()}
        train_step(uninterrupted, batch(t), t)
    resumed = role_play(CONFIG)
    for name, learner in resumed.learners.items():
        learner.load_state_dict(saved[name])
    for t in range(3, STEPS):
        train_step(resumed, batch(t), t)
    for name, learner in resumed.learners.items():
        expected = uninterrupted.learners[name].state_dict()
        assert_same(learner.state_dict(), expected, name)
