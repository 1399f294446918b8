"""The gradient of the feedback term, measured through whole steps, is the meta-gradient."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.models.shake_shake import ShakeShake
from tests.algorithms.definitions import PlainLearner, labeled_loss, soft_loss
from tests.algorithms.problems import (
    CLASSES,
    NESTEROV,
    STUDENT,
    batch,
    flat,
    mpl,
    mpl_config,
    new,
    relative_error,
)

SEED = 7  # of the dropout in the measured step
# Student, options, batch norm, dropout. (More without dropout: test_definitions.py.)
CASES: dict[str, tuple[LearnerConfig, dict[str, Any], bool, float]] = {
    "plain": (STUDENT, {}, False, 0.0),
    "clipping": (replace(STUDENT, max_grad_norm=0.05), {}, False, 0.0),
    "dropout": (STUDENT, {}, False, 0.5),
    "recomputed": (STUDENT, {"teacher_graph": "recompute"}, True, 0.5),
    "strong view": (STUDENT, {"pseudo": "strong", "bn_batches": "split"}, True, 0.5),
    "all": (
        replace(NESTEROV, max_grad_norm=0.05),
        {"label_smoothing": 0.2, "label_threshold": 0.45, "bn_batches": "split"},
        True,
        0.5,
    ),
}


def feedback_gradient(algorithm: MetaPseudoLabels, data: Batch, t: int = 0) -> Tensor:
    """The gradient of the feedback term by the teacher's weights: its step with the feedback minus
    its step without.

    The teacher must step by plain SGD of rate 1, whose steps are gradients. A copy is trained.
    """
    weight, ends = 100.0, []
    for feedback_weight in (0.0, weight):
        twin = copy.deepcopy(algorithm)
        twin.config = replace(twin.config, feedback_weight=feedback_weight)
        torch.manual_seed(SEED)
        train_step(twin, data, t)
        ends.append(flat(twin.teacher.parameters))
    return (ends[0] - ends[1]) / weight


def by_autograd(algorithm: MetaPseudoLabels, data: Batch, t: int = 0) -> Tensor:
    """The same for soft labels, by autograd through the student's step."""
    config, student = algorithm.config, PlainLearner(algorithm.student)
    teacher = copy.deepcopy(algorithm.teacher.network).train()
    torch.manual_seed(SEED)
    if config.bn_batches == "joint":
        logits = teacher(torch.cat([data.weak, data.labeled, data.strong]))
        z = logits[: len(data.weak)] if config.pseudo == "weak" else logits[-len(data.strong) :]
    elif config.pseudo == "weak":
        z = teacher(data.weak)
    else:
        z = teacher(torch.cat([data.labeled, data.strong]))[len(data.labeled) :]
    q = z.softmax(-1)
    taken = (q.detach().amax(-1) >= config.label_threshold).double()
    rows = soft_loss(student.network(data.strong), q, config.label_smoothing)
    after, _ = student.moved((rows * taken).mean(), t)
    loss = labeled_loss(student.network, data, after)
    return flat(torch.autograd.grad(loss, list(teacher.parameters()), materialize_grads=True))


def second_step(case: str, **options: Any) -> MetaPseudoLabels:
    """An algorithm in one of the cases above that has made one step."""
    student, chosen, norm, dropout = CASES[case]
    algorithm = mpl(mpl_config("exact", student, **chosen, **options), norm, dropout)
    torch.manual_seed(1)
    train_step(algorithm, batch(1), 0)
    return algorithm


@pytest.mark.parametrize(("derivative", "limit"), [("forward", 1e-9), ("central", 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_exact_is_autograd_through_the_student_step(
    case: str, derivative: str, limit: float
) -> None:
    algorithm = second_step(case, derivative=derivative)
    found, expected = feedback_gradient(algorithm, batch(), 1), by_autograd(algorithm, batch(), 1)
    assert expected.norm() > 1e-5
    assert relative_error(found, expected) < limit
    if case != "plain":  # the case is another one
        plain = by_autograd(second_step("plain", derivative=derivative), batch(), 1)
        assert len(plain) != len(expected) or relative_error(expected, plain) > 0.01


@pytest.mark.parametrize("derivative, right", [("forward", True), ("central", False)])
def test_shake_shake_is_exact_in_forward_mode(derivative: str, right: bool) -> None:
    """Its backward pass has other mixing weights than its forward pass; forward mode uses those of
    the backward pass, as the gradient of the student's step does."""
    chosen = mpl_config("exact", derivative=derivative)
    algorithm = new(chosen, lambda: ShakeShake(8, 4, CLASSES, dropout=0.0).double())
    assert isinstance(algorithm, MetaPseudoLabels)
    data = batch(shape=(3, 16, 16))
    error = relative_error(feedback_gradient(algorithm, data), by_autograd(algorithm, data))
    assert error < 1e-9 if right else error > 0.1


def drawn(feedback: Any, data: Batch, draws: int) -> tuple[Tensor, Tensor]:
    """The teacher's gradient for many draws of labels, ``(draws, P)``, and the exact one."""
    weight = 1e4
    tiny = replace(STUDENT, lr=2e-3)  # the difference is a derivative to first order
    algorithm = mpl(mpl_config(feedback, tiny, feedback_weight=weight))
    start = [learner.weights() for learner in algorithm.learners.values()]
    ends = []
    for t in range(draws + 1):
        if t == draws:
            algorithm.config = replace(algorithm.config, feedback_weight=0.0)
        for learner, weights in zip(algorithm.learners.values(), start, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(learner.parameters, weights)
        train_step(algorithm, data, t)
        ends.append(flat(algorithm.teacher.parameters))
    exact = by_autograd(mpl(mpl_config("exact", tiny)), data)
    return (ends[-1] - torch.stack(ends[:-1])) / weight, exact


@pytest.mark.slow
@pytest.mark.parametrize("feedback, share", [("sampled", 1 / 2), ("per_example", 1.0)])
def test_drawn_labels_have_the_exact_gradient_on_average(feedback: str, share: float) -> None:
    draws = 400
    found, exact = drawn(feedback, batch(unlabeled=2), draws)
    expected, mean = share * exact, found.mean(0)
    error = found.std(0) / draws**0.5
    assert ((mean - expected).abs() < 4.5 * error + 1e-9).all()
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.99
    size = found @ expected / expected.square().sum()  # 1 on average
    assert abs(size.mean() - 1) < 4.5 * size.std() / draws**0.5
    assert size.std() / draws**0.5 < 0.2  # so that half or double would be noticed


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_exact_feedback_of_compiled_networks(compiler: str) -> None:
    """Dropout must have the same masks in compiled passes and in uncompiled derivatives."""
    ends = []
    for weight in (0.0, 100.0):
        chosen = mpl_config("exact", feedback_weight=weight, derivative="forward")
        algorithm = mpl(chosen, True, 0.5, "default" if compiler == "inductor" else "off")
        expected = by_autograd(algorithm, batch())
        for learner in algorithm.learners.values():
            if compiler != "inductor":
                learner.network.compile(backend=compiler)
            assert learner.network._compiled_call_impl
        torch.manual_seed(SEED)
        train_step(algorithm, batch(), 0)
        ends.append(flat(algorithm.teacher.parameters))
    assert relative_error((ends[0] - ends[1]) / 100.0, expected) < 1e-9
