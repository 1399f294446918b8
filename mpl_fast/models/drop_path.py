"""Stochastic depth: residual branches are left out of training at random, image by image."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) of a residual branch ``(N, C, H, W)``, as timm's.

    In training the branch is 0 for an image with probability `rate`, else divided by 1 - `rate`, so
    that its expected value is the branch itself, which evaluation uses.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        # Drawn in 32 bits or more, so that a pass in another precision leaves out the same images.
        wide = torch.promote_types(branch.dtype, torch.float32)
        kept = torch.rand((len(branch), 1, 1, 1), dtype=wide, device=branch.device) >= self.rate
        return branch * (kept / (1.0 - self.rate)).to(branch.dtype)


def linear_rates(last: float, blocks: int) -> list[float]:
    """The rate of each block, from 0 at the first to `last`; there are two or more."""
    return [last * block / (blocks - 1) for block in range(blocks)]
