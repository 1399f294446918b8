"""One network's weights, gradients and moving average: what an optimizer tail has to move."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.config import LearnerConfig
from mpl_fast.models import OWN

CONFIG = LearnerConfig(
    lr=0.01, weight_decay=1e-4, max_grad_norm=5.0, schedule="constant", warmup=0, ema=0.999
)
NORM = 10.0  # of the gradients: they are clipped
FLOAT = 4  # bytes


class Problem(NamedTuple):
    """A network in channels-last layout, gradients of its parameters, and their device."""

    name: str
    network: nn.Module
    gradients: list[Tensor]
    device: torch.device

    def copies(self) -> tuple[nn.Module, nn.Module]:
        """Another network with the same weights, and its average."""
        mine = copy.deepcopy(self.network)
        return mine, copy.deepcopy(mine).requires_grad_(False)

    def minimal_bytes(self) -> int:
        """What cannot be avoided where the gradient's norm is known before anything is moved.

        Of each parameter the gradient is read for the norm; gradient, weight and momentum are read,
        weight and momentum written; the average is read and written. Of each statistic the average
        is read and written, and the statistic read.
        """
        parameters = sum(p.numel() for p in self.network.parameters())
        statistics = sum(b.numel() for b in self.network.buffers() if b.is_floating_point())
        return FLOAT * (8 * parameters + 3 * statistics)


def problem(model: str, device: torch.device, seed: int) -> Problem:
    """With random gradients of norm `NORM`. Raises `ConfigError` for an unknown name."""
    torch.manual_seed(seed)
    network = models.build(model, 10 if model in OWN else 1000)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = [torch.randn_like(p) for p in network.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return Problem(model, network, [g * (NORM / norm) for g in gradients], device)


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """Matrices and filters are decayed, norms and biases are not."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": CONFIG.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def values(network: nn.Module) -> list[Tensor]:
    """What an average moves towards: parameters and statistics."""
    everything = [*network.parameters(), *network.buffers()]
    return [t for t in everything if t.is_floating_point()]


def counters(network: nn.Module) -> list[Tensor]:
    """What an average copies."""
    return [b for b in network.buffers() if not b.is_floating_point()]


def furthest(mine: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference between two lists of tensors, NaN if there is one."""
    pairs = zip(mine, right, strict=True)
    return float(torch.stack([(m - r).detach().abs().max() for m, r in pairs]).max())
