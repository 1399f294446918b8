"""MetaSemi: the labels' correction is the meta-gradient, and the step is the published one."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.metasemi import MetaSemi
from mpl_fast.batch import Batch
from mpl_fast.config import MetaSemiConfig
from mpl_fast.learner import rng
from tests.algorithms import problems
from tests.algorithms.problems import CLASSES, PLAIN, assert_same, flat

SEED = 11
LEARNER = replace(PLAIN, lr=0.2, momentum=0.9)
CONFIG = MetaSemiConfig(learner=LEARNER, derivative="forward")


def network() -> nn.Module:
    """With running statistics that no batch has."""
    made = problems.network(norm=True)
    norm = made[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.linspace(-0.3, 0.4, 4, dtype=torch.float64)
    norm.running_var = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    return made


def batch(seed: int = 0, labeled: int = 4, unlabeled: int = 7) -> Batch:
    return problems.batch(seed, labeled, unlabeled, (3, 9, 9))


def metasemi(config: MetaSemiConfig) -> MetaSemi:
    made = problems.new(config, network, context=AlgorithmContext(SEED))
    assert isinstance(made, MetaSemi)
    made.learner.begin_step(0)
    return made


def initial() -> nn.Module:
    """The network that `metasemi` starts with."""
    torch.manual_seed(0)
    return network()


def by_autograd(data: Batch, outer: float, lr: float = 0.2) -> Tensor:
    """Labels after a step of `outer` along the gradient of the labeled loss, through the network's
    own step of rate `lr` down mean ||f - y||^2, at y = f."""
    module = initial().eval()
    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def at(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        found: Tensor = functional_call(module, weights, (images,))
        return found

    f = at(theta, data.weak).softmax(-1)
    y = f.detach().requires_grad_()
    consistency = (f - y).square().sum(-1).mean()
    gradients = torch.autograd.grad(consistency, list(theta.values()), create_graph=True)
    moved = {n: p - lr * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
    loss = F.cross_entropy(at(moved, data.labeled), data.labels)
    (meta,) = torch.autograd.grad(loss, y)
    left = (y.detach() - outer * meta).clamp_min(0.0)
    return left / left.sum(-1, keepdim=True)


@pytest.mark.parametrize("label_rate", [0.0, 0.2, 3.0])
@pytest.mark.parametrize(("derivative", "tolerance"), [("forward", 1e-9), ("central", 1e-4)])
def test_correction_is_the_meta_gradient(
    derivative: str, tolerance: float, label_rate: float
) -> None:
    """The published step, lr * 2 J g, is U times the meta-gradient of an inner step of rate lr."""
    data = batch()
    algorithm = metasemi(replace(CONFIG, derivative=derivative, label_rate=label_rate))  # type: ignore[arg-type]
    labels, labeled = algorithm.corrected_labels(data)
    rate = label_rate or LEARNER.lr
    outer = len(data.weak) * rate / 0.2
    torch.testing.assert_close(labels, by_autograd(data, outer), rtol=0, atol=tolerance)
    module = initial().eval()
    plain = module(data.weak).softmax(-1)
    assert (labels - plain).abs().max() > 0.01
    expected = F.cross_entropy(module(data.labeled), data.labels)
    torch.testing.assert_close(labeled, expected, rtol=0, atol=1e-12)
    if label_rate == 3.0:
        assert (labels == 0).any()  # what relu cut off


def test_no_label_can_become_zero_everywhere() -> None:
    """J g sums to 0 in each row, so that some class always gains: however large the step."""
    data = batch()
    labels, _ = metasemi(replace(CONFIG, label_rate=1e6)).corrected_labels(data)
    torch.testing.assert_close(labels.sum(-1), torch.ones(7, dtype=torch.float64))
    assert (labels == 0).any(-1).all()


def test_labels_lower_the_labeled_loss() -> None:
    """The network after its consistency step on corrected labels does better than on its own."""
    data, algorithm = batch(), metasemi(replace(CONFIG, label_rate=1.0))
    labels, before = algorithm.corrected_labels(data)
    module = initial().eval()
    consistency = (module(data.weak).softmax(-1) - labels).square().sum(-1).mean()
    gradients = torch.autograd.grad(consistency, list(module.parameters()))
    with torch.no_grad():
        for p, g in zip(module.parameters(), gradients, strict=True):
            p.sub_(0.05 * g)
    assert F.cross_entropy(module(data.labeled), data.labels) < before - 1e-4


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_epsilon_is_the_length_of_the_step_in_weight_space(epsilon: float) -> None:
    data = batch()
    labels, _ = metasemi(replace(CONFIG, derivative="central", epsilon=epsilon)).corrected_labels(
        data
    )
    module = initial().eval()
    loss = F.cross_entropy(module(data.labeled), data.labels)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    step = epsilon / flat(gradients).norm()
    ends = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(module)
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p.add_(sign * step * g)
            ends.append(moved(data.weak))
        dz = (ends[0] - ends[1]) / (2.0 * step)
        p = module(data.weak).softmax(-1)
        left = (p - LEARNER.lr * 2.0 * p * (dz - (p * dz).sum(-1, keepdim=True))).clamp_min(0.0)
    torch.testing.assert_close(labels, left / left.sum(-1, keepdim=True), rtol=0, atol=1e-11)


def test_a_longer_difference_is_a_worse_derivative() -> None:
    exact = metasemi(CONFIG).corrected_labels(batch())[0]
    errors = []
    for epsilon in (0.01, 0.1, 1.0):
        central = metasemi(replace(CONFIG, derivative="central", epsilon=epsilon))
        errors.append((central.corrected_labels(batch())[0] - exact).abs().max().item())
    assert 0 < 30 * errors[0] < errors[1] and 10 * errors[1] < errors[2]  # of second order


@pytest.mark.parametrize("derivative", ["forward", "central"])
def test_correction_leaves_the_network_alone(derivative: str) -> None:
    algorithm = metasemi(replace(CONFIG, derivative=derivative))  # type: ignore[arg-type]
    module = algorithm.learner.network
    before = copy.deepcopy(module.state_dict())
    algorithm.corrected_labels(batch())
    assert_same(module.state_dict(), before)
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_correction_sees_running_statistics() -> None:
    """A label depends on no other unlabeled image, which in training mode it would."""
    data = batch()
    alone = data._replace(weak=data.weak[:1], strong=data.strong[:1], truth=data.truth[:1])
    whole, one = (metasemi(CONFIG).corrected_labels(d)[0] for d in (data, alone))
    torch.testing.assert_close(whole[:1], one, rtol=0, atol=1e-12)
    other = metasemi(CONFIG)
    other.learner.network.get_buffer("1.running_var").mul_(4.0)
    assert (other.corrected_labels(data)[0] - whole).abs().max() > 1e-3


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax), summed over classes, mean over images; 0 log 0 is 0."""
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def mixed_by_hand(data: Batch, labels: Tensor, alpha: float, t: int) -> tuple[Tensor, Tensor]:
    """Unlabeled image i with labeled image i modulo their number."""
    share = rng.beta(len(data.weak), alpha, seed=SEED, step=t, device=torch.device("cpu"))
    images, targets = [], []
    for i, a in enumerate(share.tolist()):
        j = i % len(data.labels)
        images.append(a * data.labeled[j] + (1 - a) * data.weak[i])
        truth = torch.eye(CLASSES, dtype=torch.float64)[data.labels[j]]
        targets.append(a * truth + (1 - a) * labels[i])
    return torch.stack(images), torch.stack(targets)


@pytest.mark.parametrize("unlabeled", [7, 3])
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_steps_by_hand(mixup: float, unlabeled: int) -> None:
    """Three steps of SGD with momentum on KL (or CE) plus ramped squared difference, in training
    mode: first the mixed images, then the unlabeled ones, with batch norm's statistics."""
    config = replace(CONFIG, mixup=mixup, weight=3.0, ramp=2)
    algorithm, module = metasemi(config), initial().train()
    optimizer = torch.optim.SGD(module.parameters(), LEARNER.lr, momentum=0.9)
    for t in range(3):
        data = batch(t, unlabeled=unlabeled)
        labels, labeled = algorithm.corrected_labels(data)
        metrics = train_step(algorithm, data, t)
        if mixup:
            images, target = mixed_by_hand(data, labels, mixup, t)
            fit = kl_divergence(module(images), target)
            entropy = torch.special.entr(target).sum(-1).mean()
        else:
            fit, entropy = F.cross_entropy(module(data.labeled), data.labels), torch.zeros(())
        consistency = ((module(data.weak).softmax(-1) - labels) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        (fit + [1.5, 3.0, 3.0][t] * consistency).backward()
        optimizer.step()
        found = [metrics[f"loss/{name}"].item() for name in ("labeled", "fit", "consistency")]
        wanted = [labeled.item(), (fit + entropy).item(), consistency.item()]
        assert found == pytest.approx(wanted, rel=1e-9)
        assert_same(algorithm.learner.network.state_dict(), module.state_dict(), atol=1e-9)


def test_metrics_are_of_the_corrected_labels() -> None:
    data = batch()
    labels, _ = metasemi(CONFIG).corrected_labels(data)
    metrics = train_step(metasemi(CONFIG), data, 0)
    hits = [int(row.argmax()) == int(y) for row, y in zip(labels, data.truth, strict=True)]
    assert metrics["accuracy/pseudo"].item() == pytest.approx(sum(hits) / 7)
    assert metrics["confidence"].item() == pytest.approx(labels.max(-1).values.mean().item())
