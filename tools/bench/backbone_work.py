"""FLOPs and bytes of memory that one training image needs at least, from a network's shapes."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

IMAGES = 4
PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
COUNTED = PRODUCTS + NORMS + POOLS


class MinimalWork(NamedTuple):
    """Of the forward and backward pass of one image."""

    flops: int
    values: int | None
    """Activations and their gradients that are read or written, or None: see `minimal_work`."""
    weights: int

    def bytes(self, itemsize: int, batch: int) -> float | None:
        """Bytes for an image, with activations of so many bytes each.

        Weights are float32, and a batch reads them twice and writes their gradient once.
        """
        if self.values is None:
            return None
        return self.values * itemsize + 3 * 4 * self.weights / batch


def minimal_work(network: nn.Module, image_size: int) -> MinimalWork:
    """Counts with tensors on the meta device, which have shapes and no memory.

    FLOPs are those of products and convolutions, a multiplication and an addition each. Memory is
    what has to be moved if activations, dropout and additions are fused with the norm before them,
    and convolutions with nothing, as a compiler does it:

    - convolution, linear: forward reads x and writes y; backward reads dy and x for the weights,
      and reads dy and writes dx unless x is the image;
    - batch norm: forward reads x for its statistics, reads it again and writes y; backward reads x
      and dy for its sums, reads them again and writes dx;
    - pooling: reads x, writes y, reads dy, writes dx.

    A residual's second operand is not counted, nor is attention: the count is a lower bound. It is
    None for a network that has weights in other modules, such as layer norms.
    """
    dry = copy.deepcopy(network).to("meta").train()
    values: list[int] = []
    for module in dry.modules():
        if isinstance(module, COUNTED):
            module.register_forward_hook(_counter(values))
    images = torch.empty(IMAGES, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as flops:
        dry(images).sum().backward()
    known = all(isinstance(m, COUNTED) for m in dry.modules() if [*m.parameters(recurse=False)])
    moved = sum(values) // IMAGES if known else None
    weights = sum(p.numel() for p in dry.parameters())
    return MinimalWork(int(flops.get_total_flops()) // IMAGES, moved, weights)


def _counter(values: list[int]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        values.append(_values(module, inputs[0], out))

    return hook


def _values(module: nn.Module, x: Tensor, out: Tensor) -> int:
    if isinstance(module, NORMS):
        return 8 * x.numel()
    both = x.numel() + out.numel()
    if isinstance(module, PRODUCTS):
        return (3 if x.requires_grad else 2) * both
    return 2 * both
