"""Exponential moving average of a network's weights and batch-norm statistics."""

import copy

import torch
from torch import Tensor, nn

from mpl_fast.config import LearnerConfig


class WeightAverage:
    """A copy of a network whose tensors follow the network's by an exponential moving average.

    With conventions official the decay of step t is ``min(ema, (1 + t) / (10 + t))``. kekmodel:
    the decay is `ema` from the start, and statistics are copied.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay, self._warm_up = config.ema, config.conventions == "official"
        parameters = list(zip(self.network.parameters(), network.parameters(), strict=True))
        buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))
        averaged, copied = [], buffers
        if self._warm_up:
            averaged = [pair for pair in buffers if pair[1].is_floating_point()]
            copied = [pair for pair in buffers if not pair[1].is_floating_point()]
        self._averaged, self._copied = _unzip([*parameters, *averaged]), _unzip(copied)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the network's present values, after step number `step`."""
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warm_up else self._decay
        torch._foreach_lerp_(*self._averaged, 1.0 - decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
