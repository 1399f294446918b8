"""The teacher's gradient of the exact and the drawn feedback, measured through whole steps."""

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
from tests.algorithms.meta_problems import (
    CLASSES,
    NESTEROV,
    SEED,
    STUDENT,
    batch,
    by_autograd,
    config,
    flat,
    heard,
    mpl,
    mpl_of,
    off_by,
)

CASES: dict[str, tuple[LearnerConfig, dict[str, Any], bool, float]] = {
    "plain": (STUDENT, {}, False, 0.0),
    "label_smoothing": (STUDENT, {"label_smoothing": 0.2}, False, 0.0),
    "threshold": (STUDENT, {"label_threshold": 0.45}, False, 0.0),
    "clipping": (replace(STUDENT, max_grad_norm=0.05), {}, False, 0.0),
    "nesterov": (NESTEROV, {}, False, 0.0),
    "momentum without nesterov": (replace(NESTEROV, nesterov=False), {}, False, 0.0),
    "batch norm": (STUDENT, {}, True, 0.0),
    "batch norm, split": (STUDENT, {"bn_batches": "split"}, True, 0.0),
    "dropout": (STUDENT, {}, False, 0.5),
    "recomputed": (STUDENT, {"teacher_graph": "recompute"}, True, 0.5),
    "strong view": (STUDENT, {"pseudo": "strong", "bn_batches": "split"}, True, 0.5),
    "held out": (STUDENT, {"held_out": 0.5}, True, 0.0),
    "all": (
        replace(NESTEROV, max_grad_norm=0.05),
        {"label_smoothing": 0.2, "label_threshold": 0.45, "bn_batches": "split"},
        True,
        0.5,
    ),
}


def second_step(case: str, **options: Any) -> MetaPseudoLabels:
    """An algorithm in one of the cases above that has made one step."""
    student, chosen, norm, dropout = CASES[case]
    algorithm = mpl(config("exact", student, **chosen, **options), norm, dropout)
    torch.manual_seed(1)
    train_step(algorithm, batch(1), 0)
    return algorithm


@pytest.mark.parametrize("case", CASES)
def test_exact_is_autograd_through_the_student_step(case: str) -> None:
    algorithm = second_step(case, derivative="forward")
    found, wanted = heard(algorithm, batch(), 1), by_autograd(algorithm, batch())
    assert wanted.norm() > 1e-5
    assert off_by(found, wanted) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_exact_by_central_differences(case: str) -> None:
    algorithm = second_step(case, derivative="central")
    assert off_by(heard(algorithm, batch(), 1), by_autograd(algorithm, batch())) < 1e-4


def test_the_cases_are_what_they_are_called() -> None:
    def state(algorithm: MetaPseudoLabels) -> dict[str, Any]:
        return dict(algorithm.student.optimizer.state[algorithm.student.parameters[0]])

    assert state(second_step("nesterov"))["momentum_buffer"].norm() > 1e-3
    assert not state(second_step("plain")).get("momentum_buffer")
    sure = second_step("threshold").teacher.infer(batch().weak).softmax(-1).amax(-1) >= 0.45
    assert sure.any() and not sure.all()
    clipped, free = second_step("clipping"), second_step("plain")
    rates = []
    for algorithm in (clipped, free):
        algorithm.student.begin_step(1)
        rates.append(
            algorithm.student.backward_and_step(algorithm.student(batch().strong).square().mean())
        )
    assert rates[0] < 0.5 * rates[1] and rates[1] == STUDENT.lr


@pytest.mark.parametrize("derivative, right", [("forward", True), ("central", False)])
def test_shake_shake_is_exact_in_forward_mode(derivative: str, right: bool) -> None:
    """Its gradient mixes the branches otherwise than its pass does; only that mode follows it."""
    chosen = config("exact", derivative=derivative)
    algorithm = mpl_of(lambda: ShakeShake(8, 4, CLASSES, dropout=0.0).double(), chosen)
    data = batch(side=16)
    error = off_by(heard(algorithm, data), by_autograd(algorithm, data))
    assert error < 1e-9 if right else error > 0.1


def restore(algorithm: MetaPseudoLabels, weights: list[list[Tensor]]) -> None:
    for learner, values in zip(algorithm.learners.values(), weights, strict=True):
        with torch.no_grad():
            torch._foreach_copy_(learner.parameters, values)


def drawn(feedback: Any, data: Batch, draws: int) -> tuple[Tensor, Tensor]:
    """The teacher's gradient for many draws of labels, ``(draws, P)``, and what it should be."""
    weight = 1e4
    tiny = replace(STUDENT, lr=2e-3)  # the difference is a derivative to first order
    algorithm = mpl(config(feedback, tiny, feedback_weight=weight))
    start = [learner.weights() for learner in algorithm.learners.values()]
    ends = []
    for t in range(draws + 1):
        if t == draws:
            algorithm.config = replace(algorithm.config, feedback_weight=0.0)
        restore(algorithm, start)
        train_step(algorithm, data, t)
        ends.append(flat(algorithm.teacher.parameters))
    exact = by_autograd(mpl(config("exact", tiny)), data)
    return (ends[-1] - torch.stack(ends[:-1])) / weight, exact


@pytest.mark.parametrize("feedback, share", [("sampled", 1 / 2), ("per_example", 1.0)])
def test_drawn_labels_have_the_exact_gradient_on_average(feedback: str, share: float) -> None:
    draws = 1000
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
    """Dropout has to drop the same features in compiled passes and in uncompiled derivatives."""
    ends = []
    for weight in (0.0, 100.0):
        chosen = config("exact", feedback_weight=weight, derivative="forward")
        algorithm = mpl(chosen, True, 0.5, "default" if compiler == "inductor" else "off")
        wanted = by_autograd(algorithm, batch())
        for learner in algorithm.learners.values():
            if compiler != "inductor":
                learner.network.compile(backend=compiler)
            assert learner.network._compiled_call_impl
        torch.manual_seed(SEED)
        train_step(algorithm, batch(), 0)
        ends.append(flat(algorithm.teacher.parameters))
    assert off_by((ends[0] - ends[1]) / 100.0, wanted) < 1e-9
