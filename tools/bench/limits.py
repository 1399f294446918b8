"""What this machine does at best: FLOP/s of a large product or convolution, bytes/s of a copy."""

from collections.abc import Callable

import torch

from tools.bench.clock import Spread, seconds_of, spread

ROUNDS, WARMUP = 10, 3


def products(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Spread:
    """FLOP/s of products of square matrices, or of a convolution if that is faster.

    Of random numbers: zeros would need less power, so that a GPU would keep a clock that no
    training sees. `small` shows only that it runs. On a GPU, float32 is TF32 if that is allowed.
    (Some CPUs have slower libraries for products than for convolutions.)
    """
    best = _products(device, dtype, small)
    return max(best, _convolutions(device, dtype, small))


def _convolutions(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    """3 x 3 on 28 x 28 pixels of 256 channels, NHWC."""
    images, channels, side = (256, 256, 28) if device.type == "cuda" else (16, 256, 28)
    images, channels, side = (1, 16, 8) if small else (images, channels, side)
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))

    def work() -> None:
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, padding=1)

    return _rate(work, 2.0 * 9 * channels * channels * images * side * side)


def _products(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    size, calls = (8192, 10) if device.type == "cuda" else (2048, 1)
    size = 256 if small else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty(size, size, device=device, dtype=dtype)

    def work() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=c)

    return _rate(work, 2.0 * size**3 * calls)


def copies(device: torch.device, *, small: bool = False) -> Spread:
    """Bytes/s of copies too large for any cache; bytes read and bytes written both count."""
    size, calls = (2 * 10**9, 5) if device.type == "cuda" else (256 * 10**6, 1)
    size = 10**6 if small else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(calls):
            target.copy_(source)

    return _rate(work, 2.0 * size * calls)


def _rate(work: Callable[[], None], amount: float) -> Spread:
    for _ in range(WARMUP):
        work()
    return spread([amount / seconds_of(work) for _ in range(ROUNDS)])
