"""Self Meta Pseudo Labels on a network of two weights, its two updates written out in numpy."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.smpl import SelfMetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, SMPLConfig
from tests.algorithms import problems

Array = np.ndarray
START = [0.7, -0.4]
PLAIN = replace(problems.PLAIN, lr=0.3)
OPTIMIZERS = {
    "plain": PLAIN,
    "momentum": replace(PLAIN, momentum=0.9),
    "nesterov": replace(PLAIN, momentum=0.9, nesterov=True),
}
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=2, temperature=0.7, threshold=0.6)
CONFIG = SMPLConfig(
    learner=PLAIN,
    consistency=CONSISTENCY,
    label_smoothing=0.1,
    feedback_weight=3.0,
    feedback_ramp=2,
)


class TwoWeights(nn.Module):
    """logits (N, 2) = x * w: the first class is likelier where x0 w0 > x1 w1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def batch(seed: int = 0) -> Batch:
    data = problems.batch(seed, 3, 5, (2,), classes=2)
    noise = (data.strong - data.weak) / 0.3
    weak = 2.0 * data.weak
    return data._replace(weak=weak, strong=weak + noise)


def smpl(config: SMPLConfig) -> SelfMetaPseudoLabels:
    made = problems.new(config, TwoWeights)
    assert isinstance(made, SelfMetaPseudoLabels)
    return made


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def cross_entropy(z: Array, target: Array) -> float:
    return float(-(target * np.log(softmax(z))).sum(-1).mean())


def one_hot(labels: Array) -> Array:
    return np.asarray(np.eye(2)[labels])


def smoothed(target: Array, a: float) -> Array:
    return (1 - a) * target + a / 2


def ce_gradient(x: Array, w: Array, target: Array) -> Array:
    """d/dw of the mean of CE(target, softmax(x w)): mean of (p - target) x."""
    return np.asarray(((softmax(x * w) - target) * x).mean(0))


@dataclass
class ByHand:
    """The algorithm on two weights: no autograd, no optimizer object."""

    config: SMPLConfig
    w: Array
    velocity: Array
    h: float = 0.0

    def sgd_step(self, gradient: Array) -> float:
        """SGD as in torch; returns the rate that this gradient was multiplied by."""
        optim = self.config.learner
        self.velocity = optim.momentum * self.velocity + gradient
        ahead = gradient + optim.momentum * self.velocity
        self.w = self.w - optim.lr * (ahead if optim.nesterov else self.velocity)
        return optim.lr * (1 + optim.momentum if optim.nesterov else 1.0)

    def step(self, data: Batch, t: int, h_type: type[np.floating]) -> None:
        """`h_type` is the precision of the library's h, and of its product with the weight."""
        config, a = self.config, self.config.label_smoothing
        x_l, x_w, x_s = (x.numpy() for x in (data.labeled, data.weak, data.strong))
        truth, before = one_hot(data.labels.numpy()), self.w
        own = softmax(x_w * before)
        if config.feedback != "exact":
            own = one_hot(own.argmax(-1))

        rate = self.sgd_step(ce_gradient(x_s, before, smoothed(own, a)))

        w = self.w
        ramp = min(1.0, (t + 1) / 2)
        agreement = softmax(x_w * w / config.consistency.temperature)
        sure = agreement.max(-1, keepdims=True) >= config.consistency.threshold
        uda = (sure * (softmax(x_s * w) - agreement) * x_s).mean(0)
        gradient = ce_gradient(x_l, w, smoothed(truth, a)) + ramp * 2.0 * uda
        if config.feedback == "difference":
            old, new = (cross_entropy(x_l * at, truth) for at in (before, w))
            self.h = float(h_type(old - new))
            weighted = float(h_type(ramp * 3.0) * h_type(self.h))
            again = one_hot((x_w * w).argmax(-1))
            gradient = gradient + weighted * ce_gradient(x_s, w, again)
        if config.feedback == "exact":
            dz = x_s * ce_gradient(x_l, w, truth)  # along the labeled gradient at the moved weights
            p, q = softmax(x_s * before), softmax(x_w * w)
            u = dz - (p * dz).sum(-1, keepdims=True)
            scale = rate * (1 - a)
            self.h = -scale * float((u * q).sum(-1).mean())
            centered = u - (q * u).sum(-1, keepdims=True)
            gradient = gradient + ramp * 3.0 * scale * (q * centered * x_w).mean(0)
        self.sgd_step(gradient)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("feedback", ["off", "difference", "exact"])
def test_both_updates_by_hand(feedback: str, optimizer: str) -> None:
    """Over three steps, so that a gradient or velocity that survives would show."""
    config = replace(CONFIG, feedback=feedback, learner=OPTIMIZERS[optimizer], derivative="forward")  # type: ignore[arg-type]
    algorithm, hand = smpl(config), ByHand(config, np.array(START), np.zeros(2))
    for t in range(3):
        data = batch(t)
        metrics = train_step(algorithm, data, t)
        hand.step(data, t, np.float32 if metrics["feedback"].dtype == torch.float32 else np.float64)
        w = algorithm.learner.parameters[0].detach().numpy()
        np.testing.assert_allclose(w, hand.w, rtol=0, atol=1e-12)
        assert metrics["feedback"].item() == pytest.approx(hand.h, rel=1e-9, abs=1e-15)
        assert (feedback == "off") == (metrics["feedback"].item() == 0.0)


def test_central_differences_come_close() -> None:
    made = []
    for derivative in ("forward", "central"):
        config = replace(CONFIG, feedback="exact", derivative=derivative)
        algorithm = smpl(config)
        train_step(algorithm, batch(), 0)
        made.append(algorithm.learner.parameters[0].detach())
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-5)
    assert not torch.equal(made[1], made[0])


@pytest.mark.parametrize("optimizer", ["plain", "nesterov"])
def test_exact_feedback_is_the_meta_gradient(optimizer: str) -> None:
    """Autograd through the first update, down to the labels, and from them through softmax."""
    config = replace(CONFIG, feedback="exact", learner=OPTIMIZERS[optimizer], feedback_ramp=0)
    data, optim = batch(), config.learner
    # The second update with and without feedback: the rest of its gradient drops out.
    ends = [smpl(config), smpl(replace(config, feedback_weight=0.0))]
    for algorithm in ends:
        train_step(algorithm, data, 0)
    with_it, without = (e.learner.parameters[0].detach() for e in ends)
    ahead = 1 + optim.momentum if optim.nesterov else 1.0
    found = (without - with_it) / (optim.lr * ahead * config.feedback_weight)

    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    labels = (data.weak * w).softmax(-1).detach().requires_grad_()
    first = F.cross_entropy(data.strong * w, labels, label_smoothing=config.label_smoothing)
    (first_gradient,) = torch.autograd.grad(first, w, create_graph=True)
    moved = w - optim.lr * ahead * first_gradient
    result = F.cross_entropy(data.labeled * moved, data.labels)
    (to_labels,) = torch.autograd.grad(result, labels)
    at = moved.detach().requires_grad_()
    (expected,) = torch.autograd.grad((to_labels * (data.weak * at).softmax(-1)).sum(), at)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("helps", [True, False])
def test_labels_that_helped_become_likelier(helps: bool) -> None:
    """One image, labeled by the network as class 0: right or wrong for the labeled image."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    label = torch.tensor([0 if helps else 1])
    data = Batch(x, label, x, x, label)
    quiet = replace(CONSISTENCY, weight=0.0)
    for feedback in ("difference", "exact"):
        ends = []
        for weight in (3.0, 0.0):
            config = replace(CONFIG, feedback=feedback, feedback_weight=weight, feedback_ramp=0)
            algorithm = smpl(replace(config, consistency=quiet, label_smoothing=0.0))
            h = train_step(algorithm, data, 0)["feedback"].item()
            assert feedback == "exact" or (h > 0) == helps
            ends.append((x * algorithm.learner.parameters[0].detach()).softmax(-1)[0, 0].item())
        with_feedback, without = ends
        assert (with_feedback > without) == helps
        assert abs(with_feedback - without) > 1e-3


def test_no_feedback_before_the_learning_rate_rises() -> None:
    algorithm = smpl(replace(CONFIG, learner=replace(PLAIN, delay_steps=1)))
    assert train_step(algorithm, batch(), 0)["feedback"].item() == 0.0
    assert algorithm.learner.parameters[0].tolist() == START
    assert train_step(algorithm, batch(), 1)["feedback"].item() != 0.0
