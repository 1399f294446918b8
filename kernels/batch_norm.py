"""Batch norm and a ReLU after it, with their forward-mode derivative, in three launches.

x and its tangent are (rows, C), a row for each pixel of a channels_last tensor. With means over
the rows of a channel, d = x - mean(x), e = dx - mean(dx) and r = 1 / sqrt(mean(d^2) + eps):

    y = w r d + b        dy = w r e + (dw r - w r^3 mean(d e)) d + db

and both are multiplied by a slope where y <= 0: 0 is ReLU. By given statistics, which have no
derivative, e = dx and mean(d e) = 0, and one launch is all.

The first kernel reads x and dx, the third reads them again and writes y and dy. Sums are of
differences from the first row of a lane: as that is one of the lane's rows, the square of its own
difference is at most their number times the variance, so little cancels, however large the mean.
Lanes are joined by Chan's formula (doi 10.2307/2683386), in an order that depends on the shape
alone: two runs are equal, which atomics would not be.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import launch
from mpl_fast.kernels.outputs import Dual
from mpl_fast.kernels.rows import aligned

# Elements of a block, and its most channels. All moments of a larger one take too many registers.
TILE = 1024
COLUMNS = 64
PROGRAMS = 512  # that collect moments: about four for each multiprocessor of a large GPU
WARPS = 4


class _Grid(NamedTuple):
    """How (rows, C) is divided: blocks of `rows` x `columns`, `steps` of them for a program."""

    rows: int
    columns: int
    steps: int
    parts: int  # programs over the rows
    groups: int  # programs over the channels


def _grid(rows: int, channels: int) -> _Grid:
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    block, groups = TILE // columns, triton.cdiv(channels, columns)
    steps = triton.cdiv(rows, block * max(1, PROGRAMS // groups))
    return _Grid(block, columns, steps, triton.cdiv(rows, block * steps), groups)


@triton.jit
def _centered(n, mean):
    """The mean of all lanes, and how far each lane's is from it."""
    is_first = (tl.arange(0, n.shape[0]) == 0)[:, None]
    first = tl.sum(tl.where(is_first, mean, 0.0), 0)
    d = mean - first[None, :]  # a sum of means would round more than what they differ by
    shift = tl.sum(n * d, 0) / tl.sum(n, 0)
    return first + shift, d - shift[None, :]


@triton.jit
def _joined(n, mean, squares, slope, products):
    """Moments of all lanes of axis 0: mean of x, sum d^2, mean of dx, sum d e. n: rows of a lane,
    of which the first has some."""
    mean, d = _centered(n, mean)
    slope, e = _centered(n, slope)
    return mean, tl.sum(squares + n * d * d, 0), slope, tl.sum(products + n * d * e, 0)


@triton.jit
def _store_moments(ptr, pitch, mask, moments):
    """Four numbers for each channel."""
    for i in tl.static_range(len(moments)):
        tl.store(ptr + i * pitch, moments[i], mask=mask)


# Counts must not be compiled in: every last, smaller batch would be a new kernel.
@triton.jit(do_not_specialize=["rows", "steps"])
def moments_kernel(
    x_ptr,  # (rows, C)
    dx_ptr,  # (rows, C)
    part_ptr,  # (4, parts, C) float32, written: `_joined` of each part
    rows,
    C,
    steps,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (parts, groups of channels); a program reads `steps` blocks below each other."""
    C = aligned(C, ALIGN)
    part = tl.program_id(0)
    lanes = tl.arange(0, ROWS)[:, None]
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = part.to(tl.int64) * steps * ROWS  # times C can exceed 2**31 elements
    x_ptr += first * C
    dx_ptr += first * C
    left = tl.minimum(rows - first, steps * ROWS).to(tl.int32)
    offs = lanes * C + channels[None, :]
    mask = (lanes < left) & (channels < C)[None, :]
    x_0 = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx_0 = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    sum_d = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_dd = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_e = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_de = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(1, steps):
        mask = (lanes + i * ROWS < left) & (channels < C)[None, :]
        x_ptr += ROWS * C
        dx_ptr += ROWS * C
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - x_0, 0.0)
        e = tl.where(mask, dx - dx_0, 0.0)
        sum_d += d
        sum_dd += d * d
        sum_e += e
        sum_de += d * e
    n = ((left - lanes + ROWS - 1) // ROWS).to(tl.float32)  # rows of each lane
    share = 1.0 / tl.maximum(n, 1.0)
    squares = sum_dd - sum_d * sum_d * share
    products = sum_de - sum_d * sum_e * share
    moments = _joined(n, x_0 + sum_d * share, squares, dx_0 + sum_e * share, products)
    at = part_ptr + part * C + channels
    _store_moments(at, tl.num_programs(0) * C, channels < C, moments)


@triton.jit(do_not_specialize=["rows", "steps", "parts"])
def join_kernel(
    part_ptr,  # (4, parts, C) float32, of `moments_kernel`
    moments_ptr,  # (4, C) float32, written: means of x, d^2, dx and d e
    rows,
    C,
    steps,  # of each part
    parts,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # of a step
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: one program for each group of channels."""
    C = aligned(C, ALIGN)
    part = tl.arange(0, PARTS)[:, None]
    channels = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (part < parts) & (channels < C)[None, :]
    offs = part * C + channels[None, :]
    pitch = parts * C
    mean = tl.load(part_ptr + offs, mask=mask, other=0.0)
    squares = tl.load(part_ptr + pitch + offs, mask=mask, other=0.0)
    slope = tl.load(part_ptr + 2 * pitch + offs, mask=mask, other=0.0)
    products = tl.load(part_ptr + 3 * pitch + offs, mask=mask, other=0.0)
    chunk = tl.cast(steps, tl.int64) * ROWS
    n = tl.minimum(tl.maximum(rows - part * chunk, 0), chunk).to(tl.float32)
    mean, squares, slope, products = _joined(n, mean, squares, slope, products)
    count = tl.cast(rows, tl.float32)
    moments = mean, squares / count, slope, products / count
    _store_moments(moments_ptr + channels, C, channels < C, moments)


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(
    x_ptr,  # (rows, C)
    dx_ptr,  # (rows, C)
    mean_ptr,  # (C,)
    var_ptr,  # (C,)
    dmean_ptr,  # (C,) unless GIVEN
    covariance_ptr,  # (C,) unless GIVEN: mean(d e)
    w_ptr,  # (C,)
    dw_ptr,  # (C,)
    b_ptr,  # (C,)
    db_ptr,  # (C,)
    y_ptr,  # (rows, C), written
    dy_ptr,  # (rows, C), written
    rows,
    C,
    eps,
    slope,
    GIVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (blocks of rows, groups of channels)."""
    C = aligned(C, ALIGN)
    lanes = tl.arange(0, ROWS)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channels < C
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channels, mask=inside, other=1.0).to(tl.float32)
    w = tl.load(w_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    dw = tl.load(dw_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    db = tl.load(db_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    along = dw * r  # of dy on d
    if not GIVEN:
        covariance = tl.load(covariance_ptr + channels, mask=inside, other=0.0)
        along -= w * r * r * r * covariance
    first = tl.program_id(0).to(tl.int64) * ROWS
    mask = (first + lanes < rows)[:, None] & inside[None, :]
    offs = lanes[:, None] * C + channels[None, :]
    d = tl.load(x_ptr + first * C + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    e = tl.load(dx_ptr + first * C + offs, mask=mask, other=0.0).to(tl.float32)
    if not GIVEN:
        e -= tl.load(dmean_ptr + channels, mask=inside, other=0.0)[None, :]
    y = (w * r)[None, :] * d + b[None, :]
    dy = (w * r)[None, :] * e + along[None, :] * d + db[None, :]
    kept = tl.where(y > 0.0, 1.0, slope)
    tl.store(y_ptr + first * C + offs, (y * kept).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(dy_ptr + first * C + offs, (dy * kept).to(dy_ptr.dtype.element_ty), mask=mask)


def batch_norm_jvp(
    x: Dual,
    weight: Dual,
    bias: Dual,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    slope: float,
) -> Dual:
    """`reference.batch_norm_jvp`. 3 launches, 1 with given statistics; x and dx are read twice, or
    once, and y and dy written once."""
    primal, tangent = (_channels_last(tensor) for tensor in x)
    channels = primal.shape[1]
    rows = primal.numel() // channels
    y, dy = torch.empty_like(primal), torch.empty_like(primal)
    mean, var, dmean, covariance = _moments(primal, tangent) if given is None else (*given, *given)
    grid = _grid(rows, channels)
    block = 2 * grid.rows
    launch(normalize_kernel, (triton.cdiv(rows, block), grid.groups), primal)(
        *(primal, tangent, mean, var, dmean, covariance),
        *(tensor.contiguous() for tensor in (*weight, *bias)),
        *(y, dy, rows, channels, eps, slope),
        GIVEN=given is not None,
        ALIGN=math.gcd(16, channels),
        ROWS=block,
        COLUMNS=grid.columns,
        num_warps=WARPS,
    )
    return Dual(y, dy)


def _moments(x: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """Means of x, d^2, dx and d e, each (C,) float32."""
    channels = x.shape[1]
    rows, align = x.numel() // channels, math.gcd(16, channels)
    grid = _grid(rows, channels)
    part = x.new_empty((4, grid.parts, channels), dtype=torch.float32)
    launch(moments_kernel, (grid.parts, grid.groups), x)(
        *(x, dx, part, rows, channels, grid.steps),
        ALIGN=align,
        ROWS=grid.rows,
        COLUMNS=grid.columns,
        num_warps=WARPS,
    )
    moments = x.new_empty((4, channels), dtype=torch.float32)
    lanes = triton.next_power_of_2(grid.parts)
    columns = min(grid.columns, 2 * TILE // lanes)
    launch(join_kernel, (triton.cdiv(channels, columns),), x)(
        *(part, moments, rows, channels, grid.steps, grid.parts),
        ALIGN=align,
        ROWS=grid.rows,
        PARTS=lanes,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return moments.unbind()


def _channels_last(x: Tensor) -> Tensor:
    """x (N, C, ...) with neighboring channels next to each other in memory, copied only if not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
