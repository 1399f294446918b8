"""FixMatch's step, written out in plain PyTorch."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.fixmatch import FixMatch
from mpl_fast.batch import Batch
from mpl_fast.config import FixMatchConfig
from tests.algorithms import problems
from tests.algorithms.problems import PLAIN, assert_same, confident, flat, network, new

LEARNER = replace(PLAIN, lr=0.1, momentum=0.9, nesterov=True)
CONFIG = FixMatchConfig(learner=LEARNER, weight=2.0, threshold=0.42, label_smoothing=0.1)
L, U = 5, 8


def batch(seed: int = 0) -> Batch:
    """Weak and strong views of different brightness, so batch norm distinguishes them."""
    data = problems.batch(seed, L, U, (3, 9, 9))
    return data._replace(
        labeled=3 * data.labeled, weak=3 * data.weak + 2.0, strong=1.5 * data.strong - 1.0
    )


def fixmatch(config: FixMatchConfig, norm: bool = True) -> FixMatch:
    """Confident of some images and not of others."""
    made = new(config, lambda: confident(network(norm)))
    assert isinstance(made, FixMatch)
    return made


def logits(module: nn.Module, data: Batch, bn_batches: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of labeled, weak and strong images, normalized together or the weak ones apart."""
    if bn_batches == "joint":
        z_l, z_w, z_s = module(torch.cat([data.labeled, data.weak, data.strong])).split([L, U, U])
    else:
        with torch.no_grad():
            z_w = module(data.weak)
        z_l, z_s = module(torch.cat([data.labeled, data.strong])).split([L, U])
    return z_l, z_w.detach(), z_s


@pytest.mark.parametrize("threshold", [0.0, 0.42, 1.1])
@pytest.mark.parametrize("bn_batches", ["joint", "split"])
def test_steps_by_hand(bn_batches: str, threshold: float) -> None:
    config = replace(CONFIG, threshold=threshold, bn_batches=bn_batches)  # type: ignore[arg-type]
    algorithm = fixmatch(config)
    module = copy.deepcopy(algorithm.learner.network).train()
    optimizer = torch.optim.SGD(module.parameters(), LEARNER.lr, momentum=0.9, nesterov=True)
    rates = []
    for t in range(3):
        data = batch(t)
        metrics = train_step(algorithm, data, t)
        z_l, z_w, z_s = logits(module, data, bn_batches)
        confidence, label = z_w.softmax(-1).max(-1)
        mask = confidence >= threshold
        rates.append(mask.double().mean().item())
        each = F.cross_entropy(z_s, label, reduction="none")
        labeled = F.cross_entropy(z_l, data.labels, label_smoothing=0.1)
        unlabeled = (each * mask).sum() / len(mask)  # over all images, confident or not
        optimizer.zero_grad()
        (labeled + 2.0 * unlabeled).backward()
        optimizer.step()
        for name, expected in (
            ("loss/labeled", labeled),
            ("loss/consistency", unlabeled),
            ("mask_rate", mask.double().mean()),
            ("confidence", confidence.mean()),
            ("accuracy/pseudo", (label == data.truth).double().mean()),
        ):
            assert metrics[name].item() == pytest.approx(expected.item(), rel=1e-6), name
        assert_same(algorithm.learner.network.state_dict(), module.state_dict(), atol=1e-12)
    assert threshold != 0.42 or 0.0 < min(rates) < 1.0


def test_joint_and_split_batch_norm_differ_and_without_norms_agree() -> None:
    for norm in (True, False):
        ends = []
        for bn_batches in ("joint", "split"):
            algorithm = fixmatch(replace(CONFIG, bn_batches=bn_batches), norm)
            train_step(algorithm, batch(), 0)
            ends.append(flat(algorithm.learner.parameters))
        distance = (ends[0] - ends[1]).abs().max()
        assert distance > 1e-3 if norm else distance < 1e-12


def test_an_image_at_the_threshold_counts() -> None:
    """A network that has learned nothing gives each of four classes exactly a quarter."""
    for threshold, rate in ((0.25, 1.0), (0.2500001, 0.0)):
        algorithm = fixmatch(replace(CONFIG, threshold=threshold))
        for parameter in algorithm.learner.parameters[-2:]:  # of the last layer
            nn.init.zeros_(parameter)
        metrics = train_step(algorithm, batch(), 0)
        assert metrics["mask_rate"].item() == rate
        assert (metrics["loss/consistency"].item() > 0.0) == bool(rate)


def test_without_confident_images_only_the_labels_are_learned() -> None:
    algorithm = fixmatch(replace(CONFIG, threshold=1.1), norm=False)
    module = copy.deepcopy(algorithm.learner.network)
    data = batch()
    train_step(algorithm, data, 0)
    loss = F.cross_entropy(module(data.labeled), data.labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    expected = [
        p - LEARNER.lr * 1.9 * g for p, g in zip(module.parameters(), gradients, strict=True)
    ]
    assert_same(algorithm.learner.parameters, expected, atol=1e-13)
