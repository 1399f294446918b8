"""Shake-shake networks: two residual branches mixed by random weights, different in forward and
backward pass."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from mpl_fast.models.drop_path import DropPath, linear_rates


class ShakeShake(nn.Module):
    """Residual network with shake-shake regularization (arXiv 1705.07485), for 32-pixel images.

    As in Mean Teacher's PyTorch code, which MetaSemi uses: a stem of 16 channels without norm, a
    shifted 1x1 convolution where the resolution halves, no norm or activation before the pooling.
    Unlike there, one linear layer. `dropout` applies to the pooled features and is 0 in the
    literature. `drop_path` is the rate of stochastic depth of the last block's mixed branches.
    Images ``(N, 3, H, W)`` need sides divisible by 4.
    """

    def __init__(
        self, depth: int, width: int, classes: int, dropout: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        rates = iter(linear_rates(drop_path, 3 * blocks))
        channels = [16, width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        stages = []
        for stage, (before, after) in enumerate(pairwise(channels)):
            stages.append(_Block(before, after, next(rates), halve=stage > 0))
            stages += [_Block(after, after, next(rates), halve=False) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.stem(images))  # (N, 4 * width, H / 4, W / 4)
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer; timm's name for this method."""
        return self.head


def shake(first: Tensor, second: Tensor) -> Tensor:
    """Mixes two tensors ``(N, C, H, W)`` by `alpha`, with the derivatives of a mix by `beta`.

    Both are drawn for each image, uniform in [0, 1) and independent. In the value ``beta first +
    (1 - beta) second + (alpha - beta) (first - second)`` the last term is detached, so no custom
    autograd function is needed: the network is one graph under `torch.compile`; forward-mode
    differentiation uses the same `beta`, so a JVP is the exact transpose of the backward pass; and
    since both are drawn in the forward pass, the same random state gives the same gradient.
    """
    shape = (2, len(first), 1, 1, 1)
    # Drawn in 32 bits or more, so that a pass in another precision has the same mix.
    wide = torch.promote_types(first.dtype, torch.float32)
    alpha, beta = torch.rand(shape, dtype=wide, device=first.device).to(first.dtype)
    difference = first - second
    mixed: Tensor = second + beta * difference + (alpha - beta) * difference.detach()
    return mixed


class _Block(nn.Module):
    """Two branches, mixed in training and averaged in evaluation, and a shortcut."""

    def __init__(self, before: int, after: int, drop_path: float, *, halve: bool) -> None:
        super().__init__()
        self.first = _branch(before, after, 2 if halve else 1)
        self.second = _branch(before, after, 2 if halve else 1)
        self.shortcut = _shortcut(before, after, halve)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        mixed = shake(first, second) if self.training else (first + second) / 2
        shortcut: Tensor = self.shortcut(x)
        out: Tensor = shortcut + self.drop_path(mixed)
        return out


def _branch(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
    )


def _shortcut(before: int, after: int, halve: bool) -> nn.Module:
    if halve:
        return nn.Sequential(
            _Shifted(),
            nn.ReLU(),
            nn.Conv2d(2 * before, after, 1, groups=2),
            nn.BatchNorm2d(after),
        )
    if before != after:
        return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
    return nn.Identity()


class _Shifted(nn.Module):
    """Every second pixel, and its lower right neighbor as more channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., ::2, ::2], x[..., 1::2, 1::2]), 1)
