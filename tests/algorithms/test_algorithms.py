"""Every algorithm: it trains every network on batches of every shape, and what MPL's step is."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.algorithms import Algorithm
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import RECIPES, ConsistencyConfig, LearnerConfig, MPLConfig, UDAConfig
from tests.algorithms.problems import (
    CLASSES,
    VARIANTS,
    PlainLearner,
    as_dtype,
    assert_same,
    batch,
    confident,
    mpl_by_hand,
    network,
    new,
)

FAST = LearnerConfig(lr=0.1, warmup=0, ema=0.9, dropout=0.0, weight_decay=0.0, max_grad_norm=0.0)
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=0.0)
MPL = MPLConfig(teacher=FAST, student=FAST, consistency=CONSISTENCY)
# torch's attention has no forward-mode differentiation in evaluation mode.
ANY_LAYER = [n for n, c in VARIANTS.items() if getattr(c, "derivative", "auto") != "forward"]
SHAPES = {"vectors": (5,), "sequences": (4, 6), "images": (3, 5, 5), "videos": (2, 3, 4, 4)}


def with_norm() -> nn.Module:
    return network(norm=True)


def test_the_variants_include_every_recipe() -> None:
    assert {name.split()[0] for name in VARIANTS} == set(RECIPES)
    assert all(isinstance(c, RECIPES[name.split()[0]]) for name, c in VARIANTS.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_update_every_learner_and_lower_the_labeled_loss(name: str) -> None:
    """The same batch again and again; all metrics are finite scalars without gradient."""
    algorithm, data = new(VARIANTS[name], with_norm), batch(unlabeled=9)
    before = {k: copy.deepcopy(v.network.state_dict()) for k, v in algorithm.learners.items()}
    labeled = []
    for t in range(60):
        metrics = train_step(algorithm, data, t)
        labeled.append(metrics["loss/labeled"])
        for value in metrics.values():
            assert value.ndim == 0 and not value.requires_grad and torch.isfinite(value)
    assert labeled[-1] < 0.6 * labeled[0]
    for key, learner in algorithm.learners.items():
        for parameter, value in learner.network.state_dict().items():
            if parameter.endswith("weight"):
                assert not torch.equal(value, before[key][parameter]), f"{key}.{parameter}"
    torch.testing.assert_close(predict(algorithm, data.weak).sum(-1), torch.ones(9))


class Attention(nn.Module):
    """Neither a chain of layers nor batch norm: the elements of a row attend to each other."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.inside = nn.Parameter(torch.randn(numbers, 4))
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, CLASSES)``."""
        words = x.flatten(1)[:, :, None] * self.inside
        mixed, _ = self.mix(words, words, words)
        logits: Tensor = self.out(mixed.mean(1))
        return logits


def perceptron(numbers: int) -> nn.Module:
    hidden = [nn.Linear(numbers, 9), nn.BatchNorm1d(9), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(9, CLASSES))


def trained_on(
    name: str, shape: tuple[int, ...], make: Any = perceptron, dtype: torch.dtype = torch.float64
) -> tuple[Algorithm, Batch]:
    """A variant after two steps on one batch, whose metrics were finite."""
    algorithm = new(VARIANTS[name], lambda: make(torch.Size(shape).numel()).to(dtype), steps=10)
    data = as_dtype(batch(1, 6, 9, shape), dtype)
    for t in range(2):
        metrics = train_step(algorithm, data, t)
        assert all(v.ndim == 0 and torch.isfinite(v) for v in metrics.values())
    return algorithm, data


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_images_may_have_any_shape(name: str, shape: str) -> None:
    algorithm, data = trained_on(name, SHAPES[shape])
    torch.testing.assert_close(predict(algorithm, data.weak).sum(-1), torch.ones(9))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shape_of_an_image_does_not_matter_to_a_network_that_flattens_it(name: str) -> None:
    (images, _), (vectors, _) = trained_on(name, (3, 2, 2)), trained_on(name, (12,))
    for key, learner in images.learners.items():
        assert_same(learner.parameters, vectors.learners[key].parameters, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ANY_LAYER)
def test_a_network_may_be_any_module(name: str, dtype: torch.dtype) -> None:
    algorithm, data = trained_on(name, SHAPES["vectors"], Attention, dtype)
    assert predict(algorithm, data.weak).shape == (9, CLASSES)
    for learner in algorithm.learners.values():
        assert all(p.dtype == dtype for p in learner.parameters)


def test_feedback_is_exactly_zero_for_a_student_that_does_not_move() -> None:
    still = LearnerConfig(lr=0.0, warmup=0, dropout=0.5, ema=0.9)
    algorithm = new(replace(MPL, student=still), lambda: network(norm=True, dropout=0.5))
    for t in range(3):
        assert train_step(algorithm, batch(t), t)["feedback"].item() == 0.0


def test_feedback_is_old_minus_new_labeled_loss() -> None:
    algorithm, data = new(MPL, lambda: confident(network())), batch()
    student = algorithm.learners["student"]

    def labeled_loss() -> Tensor:
        return F.cross_entropy(student.forward_batch_stats(data.labeled), data.labels)

    old = labeled_loss()
    found = train_step(algorithm, data, 0)["feedback"]
    torch.testing.assert_close(found, (old - labeled_loss()).to(found.dtype))
    assert found.abs() > 1e-4


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_mpl_step_equals_the_definition(threshold: float) -> None:
    config = replace(MPL, consistency=replace(CONSISTENCY, threshold=threshold))
    algorithm, data = new(config, lambda: confident(network())), batch(unlabeled=9)
    assert isinstance(algorithm, MetaPseudoLabels)
    teacher, student = (PlainLearner(learner) for learner in algorithm.learners.values())
    train_step(algorithm, data, 0)
    mpl_by_hand(config, teacher, student, data, 0)
    for learner, plain in ((algorithm.teacher, teacher), (algorithm.student, student)):
        found, expected = learner.network.state_dict(), plain.network.state_dict()
        assert_same(found, expected, rtol=1e-7, atol=1e-8)


def test_feedback_off_leaves_the_teacher_to_uda() -> None:
    """With the feedback off the teacher ends where UDA on the same batch does."""
    uda = UDAConfig(learner=FAST, consistency=CONSISTENCY)
    off, alone, on = (new(config) for config in (replace(MPL, feedback="off"), uda, MPL))
    for algorithm in (off, alone, on):
        train_step(algorithm, batch(), 0)
    expected = alone.learners["learner"].parameters
    assert_same(off.learners["teacher"].parameters, expected, rtol=1e-6, atol=1e-9)
    with_feedback = on.learners["teacher"].parameters
    pairs = zip(with_feedback, expected, strict=True)
    assert any(not torch.allclose(p, q, atol=1e-6) for p, q in pairs)


def test_a_delayed_student_starts_after_its_delay() -> None:
    algorithm = new(replace(MPL, student=replace(FAST, delay_steps=2)), with_norm)
    student = algorithm.learners["student"]
    start = student.weights()
    for t in range(3):
        assert all(torch.equal(p, q) for p, q in zip(student.parameters, start, strict=True))
        train_step(algorithm, batch(t), t)
    assert not torch.equal(student.parameters[0], start[0])


def test_pseudo_labels_can_come_from_the_strong_view() -> None:
    weak, strong = (new(replace(MPL, pseudo=view)) for view in ("weak", "strong"))
    data = batch()
    bright = torch.full_like(data.weak, 9.0)
    data = data._replace(weak=bright, strong=-bright)
    teacher = weak.learners["teacher"]
    labels = [teacher.forward_batch_stats(x).argmax(-1) for x in (data.weak, data.strong)]
    assert not torch.equal(*labels)
    for algorithm in (weak, strong):
        train_step(algorithm, data, 0)
    pairs = zip(*(a.learners["student"].parameters for a in (weak, strong)), strict=True)
    assert any(not torch.allclose(p, q) for p, q in pairs)
