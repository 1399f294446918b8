"""A batch computed in parts gives the step of the whole batch, feedback included."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import Algorithm, AlgorithmContext, Metrics, train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.config import AlgorithmConfig, LearnerConfig, MPLConfig
from mpl_fast.learner import Learner
from tests.training.two_ranks import CONFIGS, MPL, batches, network

WHOLE = ("smpl", "metasemi", "mpl parity")
SPLITTABLE = {name: c for name, c in CONFIGS.items() if not name.startswith(WHOLE)}
SPLITTABLE["mpl soft masked"] = replace(MPL, feedback="exact", label_threshold=0.4)


def trained(config: AlgorithmConfig, count: int) -> tuple[Algorithm, list[Metrics]]:
    torch.manual_seed(0)
    facts = AlgorithmContext(seed=3, microbatches=count)
    algorithm = algorithms.build(config, lambda c: Learner(network(), c, steps=8), facts)
    return algorithm, [train_step(algorithm, batch, t) for t, batch in enumerate(batches(5))]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", SPLITTABLE)
def test_parts_give_the_step_of_the_whole_batch(name: str, count: int) -> None:
    config = SPLITTABLE[name]
    (whole, told), (parts, also_told) = trained(config, 1), trained(config, count)
    for key, learner in whole.learners.items():
        mine, other = (a.learners[key].network.state_dict() for a in (whole, parts))
        for tensor in mine:
            torch.testing.assert_close(other[tensor], mine[tensor], rtol=1e-9, atol=1e-11)
        moved = torch._foreach_sub(learner.weights(), list(network().parameters()))
        assert any(m.abs().max() > 1e-3 for m in moved)
    for one, two in zip(told, also_told, strict=True):
        assert one.keys() == two.keys()
        for metric in one:
            torch.testing.assert_close(two[metric], one[metric], rtol=1e-5, atol=1e-7)
    for key, value in whole.state.items():
        torch.testing.assert_close(parts.state[key], value, rtol=1e-5, atol=1e-9)


LEARNER = LearnerConfig(lr=0.1, warmup=0, dropout=0.0, max_grad_norm=0.0)


def with_dropout(feedback: str, graph: str, norms: str = "joint") -> MetaPseudoLabels:
    torch.manual_seed(0)

    def net() -> nn.Module:
        head = [nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5)]
        return nn.Sequential(nn.Conv2d(3, 4, 3), *head, nn.Linear(16, 4)).double()

    config = MPLConfig(
        teacher=LEARNER,
        student=LEARNER,
        feedback=feedback,  # type: ignore[arg-type]
        teacher_graph=graph,  # type: ignore[arg-type]
        bn_batches=norms,  # type: ignore[arg-type]
    )
    facts = AlgorithmContext(seed=1, microbatches=2)
    made = algorithms.build(config, lambda c: Learner(net(), c, steps=8), facts)
    assert isinstance(made, MetaPseudoLabels)
    return made


@pytest.mark.parametrize("norms", ["joint", "split"])
@pytest.mark.parametrize("feedback", ["difference", "exact"])
def test_recomputing_parts_changes_no_bit(feedback: str, norms: str) -> None:
    ends = []
    for graph in ("hold", "recompute"):
        made = with_dropout(feedback, graph, norms)
        torch.manual_seed(5)
        for t, batch in enumerate(batches(3)):
            train_step(made, batch, t)
        state = made.teacher.network.state_dict()
        if norms == "split" and feedback == "exact":
            # The weak passes of all parts come first or each with its own: running statistics
            # remember the order, the weights do not depend on it.
            state = {k: v for k, v in state.items() if "running" not in k}
        ends.append([*state.values(), *made.student.weights()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_the_derivative_drops_what_each_pass_of_the_student_dropped() -> None:
    made = with_dropout("exact", "recompute")
    dropped: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor], found: Tensor) -> None:
        if module.training:
            dropped.append(found.detach() == 0)

    made.student.network.get_submodule("4").register_forward_hook(note)
    train_step(made, batches(1)[0], 0)
    first, second, *again = dropped
    assert not torch.equal(first, second)
    assert len(again) == 2
    assert torch.equal(again[0], first) and torch.equal(again[1], second)
