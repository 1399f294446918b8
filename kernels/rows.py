"""Pieces of a kernel that works on one row of logits at a time: load, store, labeled cross-entropy.

A row is C classes, padded to W columns. It is read in blocks of BLOCK columns, or in one (SINGLE),
which then stays in registers between the sums and the gradient. Every access is masked at W and not
at C: a bound that is a multiple of 8 lets 16-byte accesses through; columns from C on are set to
-inf after loading, and to 0 before storing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts at the lowest finite number and not at -inf: (-inf) - (-inf) is NaN,
# and a row that starts with masked-out classes would turn into one.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def inverse(count):
    """1 / count in float32, divided here: inductor takes a changing batch's for an integer."""
    return tl.div_rn(1.0, tl.cast(count, tl.int64).to(tl.float32))


@triton.jit
def load_block(row_ptr, offs, C: tl.constexpr, W: tl.constexpr):
    """A block of a row as float32, -inf beyond C."""
    x = tl.load(row_ptr + offs, mask=offs < W, other=float("-inf")).to(tl.float32)
    if W != C:
        x = tl.where(offs < C, x, float("-inf"))
    return x


@triton.jit
def store_block(row_ptr, offs, x, C: tl.constexpr, W: tl.constexpr):
    """Writes a block in the row's type, 0 beyond C."""
    if W != C:
        x = tl.where(offs < C, x, 0.0)
    tl.store(row_ptr + offs, x.to(row_ptr.dtype.element_ty), mask=offs < W)


@triton.jit
def zero_row(row_ptr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Writes zeros."""
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        tl.store(row_ptr + offs, tl.zeros([BLOCK], row_ptr.dtype.element_ty), mask=offs < W)


@triton.jit
def fold_labeled(x, offs, start, m, z, sum_d, top, C: tl.constexpr):
    """Takes a block into maximum m, z = sum exp(x - m), sum_d = sum (x - m) and the arg-max."""
    block_max, block_top = tl.max(x, 0, return_indices=True)
    top = tl.where(block_max > m, start + block_top, top)  # > and not >=: of equals, the first
    m_new = tl.maximum(m, block_max)
    step = tl.where(z == 0.0, 0.0, m - m_new)  # what was summed so far moves to the new maximum
    d = x - m_new
    z = z * tl.exp2(step * LOG2E) + tl.sum(tl.exp2(d * LOG2E), 0)
    sum_d = sum_d + step * start + tl.sum(tl.where(offs < C, d, 0.0), 0)
    return m_new, z, sum_d, top


@triton.jit
def labeled_gradient(x, offs, m, z, target, coef, smoothing, C: tl.constexpr):
    """coef * dCE/dx of a block: p - (1 - a) 1[target] - a / C."""
    g = tl.exp2((x - m) * LOG2E) * (coef / z) - coef * smoothing * (1.0 / C)
    return tl.where(offs == target, g - coef * (1.0 - smoothing), g)


@triton.jit
def labeled_row(
    x_ptr,
    g_ptr,
    m,  # the row's maximum, if not STATS
    z,  # its sum of exp(x - m), if not STATS
    target,
    coef,
    smoothing,
    C: tl.constexpr,
    W: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """STATS: smoothed cross-entropy, arg-max, m and z. GRAD: writes coef times the gradient."""
    loss = tl.full([], 0.0, tl.float32)
    sum_d = tl.full([], 0.0, tl.float32)
    top = tl.full([], 0, tl.int32)
    if STATS:
        m = tl.full([], LOWEST, tl.float32)
        z = tl.full([], 0.0, tl.float32)
    if SINGLE:
        offs = tl.arange(0, BLOCK)
        x = load_block(x_ptr, offs, C, W)
        if STATS:
            m, z, sum_d, top = fold_labeled(x, offs, 0, m, z, sum_d, top, C)
        if GRAD:
            g = labeled_gradient(x, offs, m, z, target, coef, smoothing, C)
            store_block(g_ptr, offs, g, C, W)
    else:
        if STATS:
            for i in range(0, W, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                x = load_block(x_ptr, offs, C, W)
                m, z, sum_d, top = fold_labeled(x, offs, i, m, z, sum_d, top, C)
        if GRAD:
            for i in range(0, W, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                x = load_block(x_ptr, offs, C, W)
                g = labeled_gradient(x, offs, m, z, target, coef, smoothing, C)
                store_block(g_ptr, offs, g, C, W)
    if STATS:
        # All classes at -inf are NaN, as in PyTorch.
        loss = tl.log(tl.where(z == 0.0, float("nan"), z))
        loss -= (1.0 - smoothing) * (tl.load(x_ptr + target).to(tl.float32) - m)
        if smoothing > 0:  # 0 * -inf would be NaN
            loss -= smoothing * (1.0 / C) * sum_d
    return loss, top, m, z
