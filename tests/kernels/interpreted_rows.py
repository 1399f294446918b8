"""What the tests of interpreted kernels share: rows of logits, and how close is close."""

import math

import pytest
import torch
from torch import Tensor

# Two classes; fewer than a warp; ImageNet; one past a power of two; four blocks and a bit, where
# rows are read in a loop.
CLASSES = [2, 10, 1000, 1025, 9001]
# The interpreter is slow: 16-bit types, which differ by a load and a store, get half the classes.
KINDS = [(classes, torch.float32) for classes in CLASSES]
KINDS += [(classes, torch.bfloat16) for classes in (2, 1000, 9001)]
KINDS += [(classes, torch.float16) for classes in (10, 1025)]


def rows(count: int, classes: int, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """Logits of a network that is sure of some rows. Columns of padding are full of NaN."""
    generator = torch.Generator().manual_seed(count * 100_003 + classes)
    logits = torch.randn(count, classes, generator=generator) * 4
    return torch.cat((logits, torch.full((count, padding), math.nan)), 1).to(dtype)


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) * 7 % classes


def assert_value(got: Tensor, wanted: Tensor, name: str = "") -> None:
    """A 0-dim float32 next to its float64."""
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6, nan_ok=True), name


def assert_gradient(got: Tensor, wanted: Tensor) -> None:
    """As near to the float64 gradient as its type allows, at every element and as a whole."""
    assert got.shape == wanted.shape
    # The interpreter truncates to bfloat16 where a GPU rounds: 2**-7 of an element and not 2**-8.
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    # A gradient is a difference of numbers near 1 here, and may be much less than they are.
    norm = max(wanted.norm().item(), 0.5)
    torch.testing.assert_close(got.double(), wanted, rtol=close, atol=1e-6 * norm)
    rounding = (_stored(wanted, got.dtype) - wanted).norm().item()
    assert (got.double() - wanted).norm().item() <= 1.05 * rounding + 1e-6 * norm


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 as the interpreter stores it in a type."""
    if dtype == torch.bfloat16:
        return (x.float().view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    return x.to(dtype).double()
