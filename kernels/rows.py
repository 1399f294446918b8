"""Device functions shared by the kernels: blocks of a row of logits, cross-entropy with a class.

A row has C classes and is read in blocks of BLOCK columns, once for its sums and once more for its
gradient. Where one block holds the whole row the compiler removes the loops and merges both
readings: the row stays in registers.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts at the lowest finite number and not at -inf: (-inf) - (-inf) is NaN,
# and a row that starts with impossible classes would become NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def inverse(count):
    """1 / count in float32, divided here: inductor would pass 1 / rows as an integer."""
    return tl.div_rn(1.0, tl.cast(count, tl.int64).to(tl.float32))


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride in a form that shows the compiler that it is a multiple of ALIGN.

    The compiler itself only detects multiples of 16, and a bfloat16 row of 1000 would be read two
    bytes at a time.
    """
    return (stride // ALIGN) * ALIGN


@triton.jit
def load_block(row_ptr, offs, C: tl.constexpr):
    """A block of a row as float32, -inf from C on."""
    return tl.load(row_ptr + offs, mask=offs < C, other=float("-inf")).to(tl.float32)


@triton.jit
def store_block(row_ptr, offs, x, C: tl.constexpr):
    """Writes a block in the row's type."""
    tl.store(row_ptr + offs, x.to(row_ptr.dtype.element_ty), mask=offs < C)


@triton.jit
def zero_row(row_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Writes zeros."""
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        tl.store(row_ptr + offs, tl.zeros([BLOCK], row_ptr.dtype.element_ty), mask=offs < C)


@triton.jit
def valid_label(label, C: tl.constexpr):
    """A class to compute with, and a factor of its loss: NaN if there is no such class.

    Labels are not checked on the host; one out of range gives NaN, never a read outside the row.
    """
    bad = (label < 0) | (label >= C)
    return tl.where(bad, 0, label).to(tl.int32), tl.where(bad, float("nan"), 1.0)


@triton.jit
def rescaled(total, shift, z, scale):
    """sum e (v + shift) on the new scale of e; 0 where the scale is 0, even if v is -inf."""
    return tl.where(scale == 0.0, 0.0, scale * (total + shift * z))


@triton.jit
def fold_max(x, start, m, top, TOP: tl.constexpr):
    """The maximum of a block and of those before it and, if TOP, its first column."""
    if TOP:
        block_max, at = tl.max(x, 0, return_indices=True)
        top = tl.where(block_max > m, start + at, top)  # > and not >=: of equals, the first
    else:
        block_max = tl.max(x, 0)
    return tl.maximum(m, block_max), top


@triton.jit
def _fold_hard(x, offs, start, m, z, sum_d, top, C: tl.constexpr, TOP: tl.constexpr):
    """Adds a block to maximum m, z = sum exp(x - m), sum_d = sum (x - m) and, if TOP, arg-max."""
    m_new, top = fold_max(x, start, m, top, TOP)
    step = tl.where(z == 0.0, 0.0, m - m_new)  # moves the sums so far to the new maximum
    d = x - m_new
    z = z * tl.exp2(step * LOG2E) + tl.sum(tl.exp2(d * LOG2E), 0)
    sum_d = sum_d + step * start + tl.sum(tl.where(offs < C, d, 0.0), 0)
    return m_new, z, sum_d, top


@triton.jit
def hard_row(x_ptr, label, smoothing, C: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Smoothed cross-entropy of a row with a class, its maximum, its Z and, if TOP, its arg-max."""
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    sum_d = tl.full([], 0.0, tl.float32)
    top = tl.full([], 0, tl.int32)
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        m, z, sum_d, top = _fold_hard(load_block(x_ptr, offs, C), offs, i, m, z, sum_d, top, C, TOP)
    loss = tl.log(tl.where(z == 0.0, float("nan"), z))  # all classes at -inf: NaN, as in PyTorch
    loss -= (1.0 - smoothing) * (tl.load(x_ptr + label).to(tl.float32) - m)
    if smoothing > 0:  # 0 * -inf would be NaN
        loss -= smoothing * (1.0 / C) * sum_d
    return loss, m, z, top


@triton.jit
def store_hard_gradient(
    x_ptr, g_ptr, m, z, label, coef, smoothing, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes coef * dCE/dx of a row: p - (1 - a) 1[label] - a / C, a = smoothing."""
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        p = tl.exp2((load_block(x_ptr, offs, C) - m) * LOG2E) * (coef / z)
        g = p - coef * smoothing * (1.0 / C)
        store_block(g_ptr, offs, tl.where(offs == label, g - coef * (1.0 - smoothing), g), C)
