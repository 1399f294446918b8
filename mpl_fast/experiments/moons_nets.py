"""Many tiny networks as one: every weight has a leading dimension of runs, which never meet."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

WIDTHS = (2, 8, 8, 1)


class Net(NamedTuple):
    """R networks 2-8-8-1 with ReLU; a weight is laid out as in `torch.nn.Linear`."""

    weight1: Tensor  # (R, 8, 2) float64
    bias1: Tensor  # (R, 8)
    weight2: Tensor  # (R, 8, 8)
    bias2: Tensor  # (R, 8)
    weight3: Tensor  # (R, 1, 8)
    bias3: Tensor  # (R, 1)


def log_probs(net: Net, points: Tensor) -> Tensor:
    """Log-probabilities (R, N, 2) of both classes at points (R, N, 2).

    The one logit z stands for the pair (0, z), whose softmax is the sigmoid of z. So the logistic
    network is a classifier of two classes, for which the general formulas hold as they are.
    """
    hidden = _linear(points, net.weight1, net.bias1).relu()
    hidden = _linear(hidden, net.weight2, net.bias2).relu()
    z = _linear(hidden, net.weight3, net.bias3)  # (R, N, 1)
    return F.log_softmax(torch.cat([torch.zeros_like(z), z], -1), -1)


def _linear(points: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), points, weight.mT)


def cross_entropy(target: Tensor, log_p: Tensor) -> Tensor:
    """(R, N) from targets and log-probabilities (R, N, 2); a target is one-hot or soft."""
    return -(target * log_p).sum(-1)


def leaf(net: Net) -> Net:
    """The same weights, from which a gradient can be asked."""
    return Net(*(w.detach().requires_grad_() for w in net))


def gradient(losses: Tensor, net: Net) -> Net:
    """Each run's gradient of its own loss; `losses` is (R,). A sum keeps runs apart, as none
    depends on the weights of another."""
    return Net(*torch.autograd.grad(losses.sum(), net))


def descend(net: Net, slope: Net, rate: float) -> Net:
    """A step of plain SGD."""
    return Net(*(w.detach() - rate * g for w, g in zip(net, slope, strict=True)))


def slope_along(net: Net, direction: Net, points: Tensor) -> Tensor:
    """u, (R, N, 2): how fast each log-probability grows as the weights go along a direction."""
    weights, along = tuple(w.detach() for w in net), tuple(direction)
    u: Tensor = jvp(lambda *w: log_probs(Net(*w), points), weights, along)[1]
    return u


@torch.no_grad()
def predict(net: Net, points: Tensor) -> Tensor:
    """Predicted class of points (N, 2) by every run, (R, N) bool."""
    log_p = log_probs(net, points.expand(len(net.bias3), -1, -1))
    return log_p[..., 1] > log_p[..., 0]


def chosen(net: Net, runs: Sequence[int]) -> Net:
    """Only some of the runs."""
    return Net(*(w[list(runs)] for w in net))
