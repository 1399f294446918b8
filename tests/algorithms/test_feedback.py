"""What a feedback tells: its sign, silence, baseline, and the images that it listens to."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.feedback import Difference, Exact, PerExample
from mpl_fast.algorithms.labels import label
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import MPLConfig
from mpl_fast.losses import student_loss
from mpl_fast.training import checkpoint
from tests.algorithms.meta_problems import NESTEROV, PLAIN, STUDENT, batch, config, flat, mpl

FEEDBACKS: list[Any] = list(get_args(get_type_hints(MPLConfig)["feedback"]))


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_metrics_have_the_same_names_in_waiting_and_moving_steps(feedback: str) -> None:
    algorithm = mpl(config(feedback, replace(STUDENT, delay_steps=1)), norm=True)
    waiting, moving = (train_step(algorithm, batch(t), t) for t in range(2))
    assert list(waiting) == list(moving)
    if not feedback.startswith("parity_"):
        assert waiting["h"] == 0.0
    assert (moving["h"] == 0.0) == (feedback == "off")


def test_kekmodel_hears_something_of_a_student_that_waits() -> None:
    algorithm = mpl(config("parity_kekmodel", replace(STUDENT, delay_steps=1)), norm=True)
    assert train_step(algorithm, batch(), 0)["h"].abs() > 1e-3


@pytest.mark.parametrize("kind", [Difference, Exact, PerExample])
def test_a_student_at_rest_tells_exactly_nothing(kind: Any) -> None:
    """Whatever its momentum is, its dropout drops and its running statistics do."""
    algorithm = mpl(config("off", NESTEROV), norm=True, dropout=0.5)
    train_step(algorithm, batch(1), 0)
    student, data = algorithm.student, batch()
    student.freeze()
    rest = () if kind is Difference else ([data.strong], 0.1, "auto")
    feedback = kind(student, data.labeled, data.labels, *rest)
    labels = label(algorithm.teacher.infer(data.weak), "soft" if kind is Exact else "argmax")
    strong = student(data.strong)
    rate = student.backward_and_step(student_loss(strong, labels.target).loss)
    feedback.observe_update(strong.detach(), labels, rate)
    view = algorithm.teacher(data.weak)
    (gradient,) = torch.autograd.grad(feedback.term(view, labels), view)
    assert feedback.metrics()["h"] == 0.0 and not gradient.any()


def rise(feedback: Any, right: bool, t: int) -> float:
    """How much likelier the feedback makes the right label, the only one that can help.

    One image is labeled, weak and strong view at once; the teacher holds the right label likeliest,
    or a wrong one.
    """
    algorithm = mpl(config(feedback, teacher=replace(PLAIN, lr=0.01)))
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
    assert min(rise(feedback, right, t) for t in range(5)) > 1e-4


@pytest.mark.parametrize("right", [True, False])
def test_kekmodel_makes_it_less_likely_and_google_does_not_care(right: bool) -> None:
    assert rise("parity_kekmodel", right, 0) < -1e-4
    assert abs(rise("parity_google", right, 0)) < 1e-15


def labeled_loss(algorithm: MetaPseudoLabels, data: Batch) -> Tensor:
    return F.cross_entropy(algorithm.student.forward_batch_stats(data.labeled), data.labels)


def test_baseline_begins_at_zero_and_follows() -> None:
    algorithm = mpl(config("difference", baseline=0.9))
    average = algorithm.state["baseline"]
    assert average == 0.0
    expected = 0.0
    for t in range(3):
        data = batch(t)
        old = labeled_loss(algorithm, data)
        h = train_step(algorithm, data, t)["h"]
        fell = float(old - labeled_loss(algorithm, data))
        expected += 0.1 * (fell - expected)
        assert float(average) == pytest.approx(expected, abs=1e-6)
        assert float(h) == pytest.approx(fell - expected, abs=1e-6)
    assert abs(expected) > 1e-3


def test_baseline_is_restored_and_goes_on(tmp_path: Path) -> None:
    first, second = (mpl(config("sampled", baseline=0.9)) for _ in range(2))
    train_step(first, batch(), 0)
    learners = {name: learner.state_dict() for name, learner in first.learners.items()}
    saved = copy.deepcopy({"learners": learners, "algorithm": dict(first.state)})
    checkpoint.restore(second, saved, tmp_path)
    assert second.state["baseline"] == first.state["baseline"] != 0.0
    one, two = (train_step(algorithm, batch(1), 1) for algorithm in (first, second))
    assert one["h"] == two["h"] and torch.equal(first.state["baseline"], second.state["baseline"])


def test_a_waiting_student_leaves_the_baseline_alone() -> None:
    algorithm = mpl(config("difference", replace(STUDENT, delay_steps=1), baseline=0.9))
    train_step(algorithm, batch(), 0)
    assert algorithm.state["baseline"] == 0.0


@pytest.mark.parametrize("feedback", ["difference", "exact", "per_example"])
def test_held_out_images_judge_and_nothing_else(feedback: str) -> None:
    """Whatever they are, the teacher's own loss does not notice; and the other way round."""
    data = batch()
    own, judging = data.labeled.clone(), data.labeled.clone()
    own[:3], judging[3:] = 50.0, 50.0  # absurd: the teacher's own part, and the student's
    kept, told = [], []
    for images in (data.labeled, own, judging):
        algorithm = mpl(config(feedback, held_out=0.5), norm=True)
        told.append(train_step(algorithm, data._replace(labeled=images), 0))
        algorithm = mpl(config("off", held_out=0.5), norm=True)
        train_step(algorithm, data._replace(labeled=images), 0)
        kept.append(flat(algorithm.teacher.parameters))
    assert torch.equal(kept[0], kept[2]) and not torch.allclose(kept[0], kept[1])
    assert told[0]["loss/labeled"] == told[2]["loss/labeled"] != told[1]["loss/labeled"]
    assert told[0]["h"] != told[2]["h"]
    assert told[0]["loss/student_labeled"] != told[2]["loss/student_labeled"]
    if feedback == "difference":  # the labels of joint batch norm see the teacher's own part
        split: dict[str, Any] = {"held_out": 0.5, "bn_batches": "split"}
        hs = [
            train_step(mpl(config(feedback, **split), norm=True), data._replace(labeled=x), 0)["h"]
            for x in (data.labeled, own)
        ]
        assert hs[0] == hs[1]
