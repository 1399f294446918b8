"""Every recipe takes any network and any shape of batch: vectors, sequences, images and more."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import RECIPES, LearnerConfig
from mpl_fast.learner import Learner
from tests.algorithms.test_algorithms import CLASSES, VARIANTS

# The attention of torch has no forward mode in evaluation: whoever insists on it is told so.
ANY_LAYER = [n for n, c in VARIANTS.items() if getattr(c, "derivative", "auto") != "forward"]
SHAPES = {"vectors": (5,), "sequences": (4, 6), "images": (3, 5, 5), "videos": (2, 3, 4, 4)}


class Attention(nn.Module):
    """Neither a chain of layers nor batch norm; each row's elements look at each other."""

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


def network(numbers: int, kind: str) -> nn.Module:
    if kind == "attention":
        return Attention(numbers)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(numbers, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, CLASSES)
    )


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> Batch:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(15, *shape, generator=g).to(dtype)
    labels = torch.randint(CLASSES, (15,), generator=g)
    return Batch(images[:6], labels[:6], images[6:], images[6:] * 1.1, labels[6:])


def trained(
    name: str, shape: tuple[int, ...], kind: str = "norm", dtype: torch.dtype = torch.float64
) -> tuple[algorithms.Algorithm, Batch]:
    """A variant after two steps on one batch, whose metrics were finite."""
    torch.manual_seed(0)
    made = network(torch.Size(shape).numel(), kind).to(dtype)

    def learner(config: LearnerConfig) -> Learner:
        return Learner(copy.deepcopy(made), config, steps=10)

    algorithm, data = algorithms.build(VARIANTS[name], learner), batch(shape, dtype)
    for t in range(2):
        metrics = train_step(algorithm, data, t)
        assert all(v.ndim == 0 and torch.isfinite(v) for v in metrics.values())
    return algorithm, data


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_may_have_any_shape(name: str, shape: str) -> None:
    algorithm, data = trained(name, SHAPES[shape])
    torch.testing.assert_close(predict(algorithm, data.weak).sum(-1), torch.ones(9))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_means_the_same_flat(name: str) -> None:
    """The network flattens its images, so that vectors of the same numbers train it alike."""
    (images, _), (vectors, _) = trained(name, (3, 2, 2)), trained(name, (12,))
    for key, learner in images.learners.items():
        for p, q in zip(learner.parameters, vectors.learners[key].parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ANY_LAYER)
def test_a_network_may_be_any_module(name: str, dtype: torch.dtype) -> None:
    algorithm, data = trained(name, SHAPES["vectors"], "attention", dtype)
    assert predict(algorithm, data.weak).shape == (9, CLASSES)
    for learner in algorithm.learners.values():
        assert all(p.dtype == dtype for p in learner.parameters)


def test_every_recipe_is_among_them() -> None:
    assert {type(config) for config in VARIANTS.values()} == set(RECIPES.values())
