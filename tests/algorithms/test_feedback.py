"""The feedback of MPL: its sign, when there is none, its baseline, and which images measure it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.feedback import make_feedback
from mpl_fast.algorithms.labels import make_labels
from mpl_fast.batch import Batch
from mpl_fast.losses import student_loss_and_grad
from mpl_fast.training.state import restore
from tests.algorithms.definitions import labeled_loss
from tests.algorithms.problems import (
    FEEDBACKS,
    NESTEROV,
    PLAIN,
    STUDENT,
    batch,
    flat,
    mpl,
    mpl_config,
    state,
)

DELAYED = replace(STUDENT, delay_steps=1)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_metrics_have_the_same_names_in_delayed_and_later_steps(feedback: str) -> None:
    algorithm = mpl(mpl_config(feedback, DELAYED), norm=True)
    delayed, later = (train_step(algorithm, batch(t), t) for t in range(2))
    assert list(delayed) == list(later)
    if not feedback.startswith("parity_"):
        assert delayed["feedback"] == 0.0
    assert (later["feedback"] == 0.0) == (feedback == "off")


def test_kekmodel_has_feedback_of_a_student_that_does_not_move() -> None:
    algorithm = mpl(mpl_config("parity_kekmodel", DELAYED), norm=True)
    assert train_step(algorithm, batch(), 0)["feedback"].abs() > 1e-3


@pytest.mark.parametrize("kind", ["difference", "exact", "per_example"])
def test_feedback_of_a_frozen_student_is_exactly_zero(kind: str) -> None:
    """With momentum, dropout and any running statistics."""
    algorithm = mpl(mpl_config("off", NESTEROV), norm=True, dropout=0.5)
    train_step(algorithm, batch(1), 0)
    student, data = algorithm.student, batch()
    feedback = make_feedback(mpl_config(kind), student, data, [data.strong], fused=False)
    student.freeze()
    labels = make_labels(algorithm.teacher.infer(data.weak), mpl_config(kind).label_kind)
    strong = student(data.strong)
    _, grad_logits = student_loss_and_grad(strong, labels.target)
    rate = student.backward_and_step((strong, grad_logits))
    feedback.observe_update(strong.detach(), labels, rate)
    view = algorithm.teacher(data.weak)
    (gradient,) = torch.autograd.grad(feedback.term(view), view)
    assert feedback.metrics()["feedback"] == 0.0 and not gradient.any()


def gain(feedback: Any, right: bool, t: int) -> float:
    """How much likelier the feedback makes the right label, the only one that can help.

    One image is labeled, weak and strong view at once; for the teacher the right label is the
    likeliest, or a wrong one.
    """
    algorithm = mpl(mpl_config(feedback, teacher=replace(PLAIN, lr=0.01)))
    image, y = batch().labeled[:1], 1
    data = Batch(image, torch.tensor([y]), image, image, torch.tensor([y]))
    with torch.no_grad():
        algorithm.teacher.parameters[-1][y if right else 2] += 1.5
        algorithm.teacher.parameters[-1][[0, 3]] -= 20.0  # never drawn
    assert (algorithm.teacher.infer(image).argmax() == y) == right
    chances = []
    for weight in (0.0, 1.0):
        twin = copy.deepcopy(algorithm)
        twin.config = replace(twin.config, feedback_weight=weight)
        train_step(twin, data, t)
        chances.append(twin.teacher.infer(image).softmax(-1)[0, y].item())
    return chances[1] - chances[0]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("feedback", ["difference", "sampled", "per_example", "exact"])
def test_a_label_that_helps_becomes_likelier(feedback: str, right: bool) -> None:
    assert min(gain(feedback, right, t) for t in range(5)) > 1e-4


@pytest.mark.parametrize("right", [True, False])
def test_kekmodel_makes_it_less_likely_and_google_has_no_effect(right: bool) -> None:
    assert gain("parity_kekmodel", right, 0) < -1e-4
    assert abs(gain("parity_google", right, 0)) < 1e-15


@pytest.mark.parametrize(
    ("feedback", "baseline", "decay", "sign"),
    [
        ("difference", 0.9, 0.9, 1.0),
        ("parity_google", 0.0, 0.99, -1.0),  # that code always has an average
        ("parity_google", 0.75, 0.75, -1.0),
    ],
)
def test_the_baseline_starts_at_zero_and_is_a_moving_average(
    feedback: str, baseline: float, decay: float, sign: float
) -> None:
    """It moves first, by 1 - decay of the way, and is then subtracted."""
    algorithm, expected = mpl(mpl_config(feedback, baseline=baseline)), 0.0
    average, student = algorithm.state["baseline"], algorithm.student.network
    assert average == 0.0
    for t in range(3):
        data = batch(t)
        old = labeled_loss(student, data)
        h = train_step(algorithm, data, t)["feedback"]
        difference = sign * float((old - labeled_loss(student, data)).detach())
        expected += (1 - decay) * (difference - expected)
        assert float(average) == pytest.approx(expected, abs=1e-6)
        assert float(h) == pytest.approx(difference - expected, abs=1e-6)
    assert abs(expected) > 1e-3 * (1 - decay)


def test_the_baseline_is_restored_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = (mpl(mpl_config("sampled", baseline=0.9)) for _ in range(2))
    train_step(first, batch(), 0)
    saved = state(first)
    restore(second, {"algorithm": saved.pop("algorithm"), "learners": saved}, tmp_path)
    assert second.state["baseline"] == first.state["baseline"] != 0.0
    one, two = (train_step(algorithm, batch(1), 1) for algorithm in (first, second))
    assert one["feedback"] == two["feedback"]
    assert torch.equal(first.state["baseline"], second.state["baseline"])


def test_a_delayed_student_does_not_change_the_baseline() -> None:
    algorithm = mpl(mpl_config("difference", DELAYED, baseline=0.9))
    train_step(algorithm, batch(), 0)
    assert algorithm.state["baseline"] == 0.0


@pytest.mark.parametrize("feedback", ["difference", "exact", "per_example"])
def test_held_out_images_are_for_the_feedback_alone(feedback: str) -> None:
    """The teacher's own loss does not depend on them, nor the feedback on the others."""
    data = batch()
    others, held_out = data.labeled.clone(), data.labeled.clone()
    others[:3], held_out[3:] = 50.0, 50.0  # absurd images for the teacher, or for the student
    weights, metrics = [], []
    for images in (data.labeled, others, held_out):
        changed = data._replace(labeled=images)
        metrics.append(train_step(mpl(mpl_config(feedback, held_out=0.5), True), changed, 0))
        algorithm = mpl(mpl_config("off", held_out=0.5), norm=True)
        train_step(algorithm, changed, 0)
        weights.append(flat(algorithm.teacher.parameters))
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1])
    plain, of_others, of_held_out = metrics
    assert plain["loss/labeled"] == of_held_out["loss/labeled"] != of_others["loss/labeled"]
    assert plain["feedback"] != of_held_out["feedback"]
    assert plain["loss/student_labeled"] != of_held_out["loss/student_labeled"]
    if feedback == "difference":  # with joint batch norm the pseudo labels depend on the others
        split: dict[str, Any] = {"held_out": 0.5, "bn_batches": "split"}
        found = [
            train_step(mpl(mpl_config(feedback, **split), True), data._replace(labeled=x), 0)
            for x in (data.labeled, others)
        ]
        assert found[0]["feedback"] == found[1]["feedback"]
