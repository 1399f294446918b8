"""Microbatches give the step of the whole batch, feedback included."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast.algorithms import Algorithm, AlgorithmContext
from mpl_fast.algorithms.base import Metrics, train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.config import AlgorithmConfig, LearnerConfig, MPLConfig
from tests.algorithms.problems import MPL, VARIANTS, assert_same, batch, confident, network, new

SPLITTABLE = {name: config for name, config in VARIANTS.items() if not config.whole_batch}
SPLITTABLE["mpl soft masked"] = replace(MPL, feedback="exact", label_threshold=0.4)
L, U = 8, 12


def trained(config: AlgorithmConfig, count: int) -> tuple[Algorithm, list[Metrics]]:
    context = AlgorithmContext(seed=3, microbatches=count)
    algorithm = new(config, lambda: confident(network()), steps=8, context=context)
    return algorithm, [train_step(algorithm, batch(t, L, U), t) for t in range(5)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", SPLITTABLE)
def test_microbatches_give_the_step_of_the_whole_batch(name: str, count: int) -> None:
    config = SPLITTABLE[name]
    (whole, metrics), (split, split_metrics) = trained(config, 1), trained(config, count)
    start = new(config, lambda: confident(network()))
    for key, learner in whole.learners.items():
        found = split.learners[key].network.state_dict()
        assert_same(found, learner.network.state_dict(), rtol=1e-9, atol=1e-11)
        moved = torch._foreach_sub(learner.weights(), start.learners[key].weights())
        assert any(m.abs().max() > 1e-3 for m in moved)
    assert_same(split_metrics, metrics, rtol=1e-5, atol=1e-7)
    assert_same(dict(split.state), dict(whole.state), rtol=1e-5, atol=1e-9)


def with_dropout(feedback: Any, graph: Any, norms: Any = "joint") -> MetaPseudoLabels:
    learner = LearnerConfig(lr=0.1, warmup=0, max_grad_norm=0.0)
    config = MPLConfig(
        teacher=learner, student=learner, feedback=feedback, teacher_graph=graph, bn_batches=norms
    )
    context = AlgorithmContext(seed=1, microbatches=2)
    made = new(config, lambda: network(norm=True, dropout=0.5), steps=8, context=context)
    assert isinstance(made, MetaPseudoLabels)
    return made


@pytest.mark.parametrize("norms", ["joint", "split"])
@pytest.mark.parametrize("feedback", ["difference", "exact"])
def test_recomputing_microbatches_changes_no_bit(feedback: str, norms: str) -> None:
    ends = []
    for graph in ("hold", "recompute"):
        made = with_dropout(feedback, graph, norms)
        torch.manual_seed(5)
        for t in range(3):
            train_step(made, batch(t, L, U), t)
        state = made.teacher.network.state_dict()
        if norms == "split" and feedback == "exact":
            # The weak passes come first of all or each with its microbatch: running statistics
            # depend on that order, weights do not.
            state = {k: v for k, v in state.items() if "running" not in k}
        ends.append([*state.values(), *made.student.weights()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_the_derivative_has_the_dropout_masks_of_each_student_pass() -> None:
    made = with_dropout("exact", "recompute")
    masks: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor], found: Tensor) -> None:
        if module.training:
            masks.append(found.detach() == 0)

    dropout = next(m for m in made.student.network.modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(note)
    train_step(made, batch(0, L, U), 0)
    first, second, *derivatives = masks
    assert not torch.equal(first, second)
    assert len(derivatives) == 2
    assert torch.equal(derivatives[0], first) and torch.equal(derivatives[1], second)
