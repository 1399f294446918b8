"""The optimizer of a network, and which of its parameters are decayed."""

from typing import Any

import torch
from torch import nn

from mpl_fast.config import LearnerConfig


def build(network: nn.Module, config: LearnerConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW over the trained parameters; fused on CUDA."""
    groups, fused = _groups(network, config), device.type == "cuda"
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, betas=(config.momentum, 0.999), fused=fused)
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )


def _groups(network: nn.Module, config: LearnerConfig) -> list[dict[str, Any]]:
    """Norms and biases, the parameters of at most one dimension, are not decayed."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return "bn" not in name if config.conventions == "kekmodel" else parameter.ndim > 1

    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if decays(n, p)]
    others = [p for n, p in named if not decays(n, p)]
    groups = [(decayed, config.weight_decay), (others, 0.0)]
    return [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]
