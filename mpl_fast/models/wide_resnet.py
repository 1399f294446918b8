"""The wide ResNets of the semi-supervised CIFAR literature, for 32-pixel images."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.models.drop_path import DropPath, linear_rates


class WideResNet(nn.Module):
    """Wide ResNet (arXiv 1605.07146) after kekmodel/MPL-pytorch.

    Stem of 16 channels, LeakyReLU with slope 0.1, batch norm with momentum 0.001, dropout on the
    pooled features. Unlike there, the first convolution of the later stages gets the normalized
    features too; that code computes them and does not use them. `drop_path` is the rate of
    stochastic depth in the last block.
    """

    SLOPE = 0.1
    NORM_MOMENTUM = 0.001

    def __init__(
        self, depth: int, width: int, classes: int, dropout: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        rates = iter(linear_rates(drop_path, 3 * blocks))
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        stages = []
        for stage, (before, after) in enumerate(pairwise(channels)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                first = stage == 0 and block == 0
                width_in = before if block == 0 else after
                stages.append(_Block(width_in, after, stride, first, next(rates)))
        self.blocks = nn.Sequential(*stages)
        self.norm = _norm(channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=self.SLOPE, mode="fan_out")
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = _activate(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer; timm's name for this method."""
        return self.head


class _Block(nn.Module):
    """Norm, activation, convolution, twice, around a shortcut.

    With `activate_shortcut`, of the very first block, the shortcut gets the activated features.
    """

    def __init__(
        self, before: int, after: int, stride: int, activate_shortcut: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        changes = before != after or stride != 1
        self.shortcut = (
            nn.Conv2d(before, after, 1, stride, bias=False) if changes else nn.Identity()
        )
        self.activate_shortcut = activate_shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        active = _activate(self.norm1(x))
        shortcut: Tensor = self.shortcut(active if self.activate_shortcut else x)
        residual: Tensor = self.conv2(_activate(self.norm2(self.conv1(active))))
        out: Tensor = shortcut + self.drop_path(residual)
        return out


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=WideResNet.NORM_MOMENTUM)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, WideResNet.SLOPE)
