"""R tiny networks as one module, so that R independent runs are one step of an algorithm.

The runs share neither weights nor rows: the gradient of a sum over runs is each run's own. Rows of
a batch are ordered by example, then by run: row ``j * R + r`` is example j of run r. Batches of
this order may be concatenated, and cut at a multiple of R, for all runs at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (2, 8, 8, 1)
Weights = list[Tensor]  # weight (R, outputs, inputs) and bias (R, 1, outputs) of each layer


class Networks(nn.Module):
    """R networks 2-8-8-1 with ReLU in float64."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.runs = len(weights[0])
        self.weights = nn.ParameterList(nn.Parameter(w.clone()) for w in weights)

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(N * R, 2)`` of points ``(N * R, 2)``.

        The one output z becomes the pair (0, z), whose softmax is the sigmoid of z.
        """
        hidden = points.view(-1, self.runs, WIDTHS[0]).transpose(0, 1)  # (R, N, 2)
        weights = list(self.weights)  # a slice of a ParameterList would be a copy
        *inner, last = zip(weights[::2], weights[1::2], strict=True)
        for weight, bias in inner:
            hidden = torch.baddbmm(bias, hidden, weight.mT).relu()
        z = as_rows(torch.baddbmm(last[1], hidden, last[0].mT))  # (N * R, 1)
        return torch.cat([torch.zeros_like(z), z], -1)


def as_rows(runs: Tensor) -> Tensor:
    """From ``(R, N, ...)`` to rows ``(N * R, ...)``."""
    return runs.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def predict(weights: Sequence[Tensor], points: Tensor) -> Tensor:
    """Predicted class of points ``(N, 2)`` by every run, ``(R, N)`` bool."""
    networks = Networks(weights)
    logits: Tensor = networks(points.repeat_interleave(networks.runs, 0))
    return (logits[:, 1] > 0).view(len(points), -1).T


def chosen(weights: Sequence[Tensor], runs: slice) -> Weights:
    """Weights of some of the runs."""
    return [w[runs] for w in weights]
