"""FixMatch's step, written out in plain PyTorch."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.fixmatch import FixMatch
from mpl_fast.batch import Batch
from mpl_fast.config import FixMatchConfig, LearnerConfig
from mpl_fast.learner import Learner

CLASSES = 4
LEARNER = LearnerConfig(
    lr=0.1, warmup=0, schedule="constant", weight_decay=0.0, max_grad_norm=0.0, dropout=0.0
)
CONFIG = FixMatchConfig(learner=LEARNER, weight=2.0, threshold=0.55, label_smoothing=0.1)


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6)] if norm else []
    head = [nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)]
    made = nn.Sequential(nn.Conv2d(3, 6, 3, 2), *norms, *head).double()
    with torch.no_grad():
        made.get_parameter(f"{len(made) - 1}.weight").mul_(
            6.0
        )  # sure of some images, unsure of others
    return made


def batch(seed: int = 0) -> Batch:
    """Weak and strong views of different brightness, which batch norm sees."""
    g = torch.Generator().manual_seed(seed)
    images = 3.0 * torch.randn(13, 3, 9, 9, generator=g, dtype=torch.float64)
    labels = torch.randint(CLASSES, (13,), generator=g)
    weak = images[5:] + 2.0
    strong = images[5:] * 0.5 - 1.0
    return Batch(images[:5], labels[:5], weak, strong, labels[5:])


def new(config: FixMatchConfig, norm: bool = True) -> FixMatch:
    made = algorithms.build(config, lambda optim: Learner(network(norm), optim, steps=100))
    assert isinstance(made, FixMatch)
    return made


def logits(module: nn.Module, data: Batch, bn_batches: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of labeled, weak and strong images, normalized together or the weak ones apart."""
    if bn_batches == "joint":
        z_l, z_w, z_s = module(torch.cat([data.labeled, data.weak, data.strong])).split([5, 8, 8])
    else:
        with torch.no_grad():
            z_w = module(data.weak)
        z_l, z_s = module(torch.cat([data.labeled, data.strong])).split([5, 8])
    return z_l, z_w.detach(), z_s


@pytest.mark.parametrize("threshold", [0.0, 0.55, 1.1])
@pytest.mark.parametrize("bn_batches", ["joint", "split"])
def test_steps_by_hand(bn_batches: str, threshold: float) -> None:
    config = replace(CONFIG, threshold=threshold, bn_batches=bn_batches)  # type: ignore[arg-type]
    algorithm, module = new(config), network().train()
    optimizer = torch.optim.SGD(module.parameters(), LEARNER.lr, momentum=0.9, nesterov=True)
    rates = []
    for t in range(3):
        data = batch(t)
        metrics = train_step(algorithm, data, t)
        z_l, z_w, z_s = logits(module, data, bn_batches)
        confidence, label = z_w.softmax(-1).max(-1)
        sure = confidence >= threshold
        rates.append(sure.double().mean().item())
        each = F.cross_entropy(z_s, label, reduction="none")
        labeled = F.cross_entropy(z_l, data.labels, label_smoothing=0.1)
        unlabeled = (each * sure).sum() / len(sure)  # over all images, sure or not
        optimizer.zero_grad()
        (labeled + 2.0 * unlabeled).backward()
        optimizer.step()
        for name, wanted in (
            ("loss/labeled", labeled),
            ("loss/consistency", unlabeled),
            ("mask_rate", sure.double().mean()),
            ("confidence", confidence.mean()),
            ("accuracy/pseudo", (label == data.truth).double().mean()),
        ):
            assert metrics[name].item() == pytest.approx(wanted.item(), rel=1e-6), name
        theirs = algorithm.learner.network.state_dict()
        for name, value in module.state_dict().items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-12, msg=name)
    assert threshold != 0.55 or 0.0 < min(rates) < 1.0


def test_joint_and_split_batch_norm_differ_and_without_norms_agree() -> None:
    for norm in (True, False):
        ends = []
        for bn_batches in ("joint", "split"):
            algorithm = new(replace(CONFIG, bn_batches=bn_batches), norm)
            train_step(algorithm, batch(), 0)
            ends.append(torch.cat([p.detach().flatten() for p in algorithm.learner.parameters]))
        distance = (ends[0] - ends[1]).abs().max()
        assert distance > 1e-3 if norm else distance < 1e-12


def test_an_image_at_the_threshold_counts() -> None:
    """A network that has learned nothing gives each of four classes exactly a quarter."""
    for threshold, rate in ((0.25, 1.0), (0.2500001, 0.0)):
        algorithm = new(replace(CONFIG, threshold=threshold))
        for parameter in algorithm.learner.parameters[-2:]:  # of the last layer
            nn.init.zeros_(parameter)
        metrics = train_step(algorithm, batch(), 0)
        assert metrics["mask_rate"].item() == rate
        assert (metrics["loss/consistency"].item() > 0.0) == bool(rate)


def test_unsure_images_teach_nothing() -> None:
    """Above every confidence the step is that of the labeled images alone."""
    algorithm = new(replace(CONFIG, threshold=1.1), norm=False)
    module = copy.deepcopy(algorithm.learner.network)
    data = batch()
    train_step(algorithm, data, 0)
    loss = F.cross_entropy(module(data.labeled), data.labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    for mine, p, g in zip(
        algorithm.learner.parameters, module.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(mine, p - LEARNER.lr * 1.9 * g, rtol=0, atol=1e-13)
