"""Every algorithm trains every network on batches of every shape."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast.algorithms import Algorithm
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import RECIPES, FixMatchConfig
from tests.algorithms.problems import (
    CLASSES,
    LEARNER,
    VARIANTS,
    as_dtype,
    assert_same,
    batch,
    network,
    new,
)

# torch's attention has no forward-mode differentiation in evaluation mode.
ANY_LAYER = [n for n, c in VARIANTS.items() if getattr(c, "derivative", "auto") != "forward"]
UNLABELED = [name for name, config in RECIPES.items() if not config.labeled_only]
SHAPES = {"vectors": (5,), "sequences": (4, 6), "images": (3, 5, 5), "videos": (2, 3, 4, 4)}


def with_norm() -> nn.Module:
    return network(norm=True)


def test_the_variants_include_every_recipe() -> None:
    assert {name.split()[0] for name in VARIANTS} == set(RECIPES)
    assert all(isinstance(c, RECIPES[name.split()[0]]) for name, c in VARIANTS.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_update_every_learner_and_lower_the_labeled_loss(name: str) -> None:
    """The same batch again and again; all metrics are finite and without gradient."""
    algorithm, data = new(VARIANTS[name], with_norm), batch(unlabeled=9)
    before = {k: copy.deepcopy(v.network.state_dict()) for k, v in algorithm.learners.items()}
    labeled = []
    for t in range(20):
        metrics = train_step(algorithm, data, t)
        labeled.append(metrics["loss/labeled"])
        for key, value in metrics.items():
            assert value.shape == ((2,) if key == "accuracy/pseudo" else ())
            assert not value.requires_grad and value.isfinite().all()
        assert metrics.get("accuracy/pseudo", torch.tensor([0, 6]))[1] == 6  # of 9 have a label
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
        assert all(v.isfinite().all() for v in metrics.values())
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


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.split()[0] in UNLABELED])
def test_without_a_label_no_pseudo_label_is_right(name: str) -> None:
    """Nor is that of an image that is not finite."""
    algorithm, data = new(VARIANTS[name]), batch()
    data.truth.fill_(-1)
    assert train_step(algorithm, data, 0)["accuracy/pseudo"].tolist() == [0.0, 0.0]
    data.weak.fill_(math.nan)
    data.strong.fill_(math.nan)
    assert train_step(algorithm, data, 1)["accuracy/pseudo"].tolist() == [0.0, 0.0]


def test_an_image_at_the_threshold_counts() -> None:
    """A network that has learned nothing gives each of four classes exactly a quarter."""
    for threshold, rate in ((0.25, 1.0), (0.2500001, 0.0)):
        algorithm = new(FixMatchConfig(learner=LEARNER, threshold=threshold))
        for parameter in algorithm.learners["learner"].parameters[-2:]:  # of the last layer
            nn.init.zeros_(parameter)
        metrics = train_step(algorithm, batch(), 0)
        assert metrics["mask_rate"].item() == rate
        assert (metrics["loss/consistency"].item() > 0.0) == bool(rate)
