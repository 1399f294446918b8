"""What a kernel does to a row of logits s whose target is softmax(t / T) of another row t.

With d = x - max(x), e_t = exp(d_t / T) and label smoothing a:

    loss = log Z_s - (1 - a) sum e_t d_s / Z_t - a mean d_s
    dloss/ds = exp(d_s) / Z_s - (1 - a) e_t / Z_t - a / C

e_t is taken to the base of 2, as 2 ** (rate d_t): one product less for each logit.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.pairs import rescaled
from mpl_fast.kernels.rows import LOG2E, LOWEST, inverse, load_block, store_block


@triton.jit
def _fold(s, t, offs, start, m_s, z_s, m_t, z_t, dot, sum_d, rate, C: tl.constexpr):
    """Takes a block of both rows into maxima, Z, sum e_t d_s and sum d_s."""
    max_s = tl.maximum(m_s, tl.max(s, 0))
    max_t = tl.maximum(m_t, tl.max(t, 0))
    step_s = tl.where(z_s == 0.0, 0.0, m_s - max_s)
    step_t = tl.where(z_t == 0.0, 0.0, (m_t - max_t) * rate)
    scale_t = tl.exp2(step_t)
    dot = rescaled(dot, step_s, z_t, scale_t)
    d_s = s - max_s
    e_t = tl.exp2((t - max_t) * rate)  # subtract first: t / T overflows where T is tiny
    z_s = z_s * tl.exp2(step_s * LOG2E) + tl.sum(tl.exp2(d_s * LOG2E), 0)
    z_t = z_t * scale_t + tl.sum(e_t, 0)
    dot += tl.sum(tl.where(e_t > 0, e_t * d_s, 0.0), 0)
    sum_d += step_s * start + tl.sum(tl.where(offs < C, d_s, 0.0), 0)
    return max_s, z_s, max_t, z_t, dot, sum_d


@triton.jit
def _sums(s_ptr, t_ptr, rate, C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """What `_fold` makes of two whole rows, block by block; a row that is one block included."""
    m_s = tl.full([], LOWEST, tl.float32)
    m_t = tl.full([], LOWEST, tl.float32)
    z_s = tl.full([], 0.0, tl.float32)
    z_t = tl.full([], 0.0, tl.float32)
    dot = tl.full([], 0.0, tl.float32)
    sum_d = tl.full([], 0.0, tl.float32)
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        s = load_block(s_ptr, offs, C, W)
        t = load_block(t_ptr, offs, C, W)
        m_s, z_s, m_t, z_t, dot, sum_d = _fold(
            s, t, offs, i, m_s, z_s, m_t, z_t, dot, sum_d, rate, C
        )
    return m_s, z_s, m_t, z_t, dot, sum_d


@triton.jit
def _store_gradient(
    s_ptr,
    t_ptr,
    g_ptr,
    m_s,
    m_t,
    rate,
    c_p,
    c_q,
    c_1,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes c_p exp(d_s) - c_q e_t - c_1 of two whole rows, block by block."""
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        p = tl.exp2((load_block(s_ptr, offs, C, W) - m_s) * LOG2E) * c_p
        q = tl.exp2((load_block(t_ptr, offs, C, W) - m_t) * rate) * c_q
        store_block(g_ptr, offs, p - q - c_1, C, W)


@triton.jit
def row_share(n, weight_ptr, WEIGHTED: tl.constexpr):
    """A row's part in a mean over n rows."""
    share = inverse(n)
    if WEIGHTED:
        share *= tl.load(weight_ptr).to(tl.float32)
    return share


@triton.jit
def arrived(upstream_ptr, SCALED: tl.constexpr):
    """The gradient that arrives from above."""
    upstream = 1.0
    if SCALED:
        upstream = tl.load(upstream_ptr).to(tl.float32)
    return upstream


@triton.jit
def soft_row(
    s_ptr,
    t_ptr,
    g_ptr,
    saved_ptr,
    saved_pitch,
    n,
    weight_ptr,
    upstream_ptr,
    rate,
    smoothing,
    C: tl.constexpr,
    W: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """STATS: the row's share of the loss, and what its gradient needs. GRAD: writes this gradient.

    Of rows that are one block the compiler merges both readings; they stay in registers.
    """
    loss = 0.0
    if STATS:
        m_s, z_s, m_t, z_t, dot, sum_d = _sums(s_ptr, t_ptr, rate, C, W, BLOCK)
        # All classes at -inf are NaN, as in PyTorch: of s by the logarithm, of t by 0 / 0.
        loss = tl.log(tl.where(z_s == 0.0, float("nan"), z_s)) - (1.0 - smoothing) * (dot / z_t)
        if smoothing > 0:  # 0 * -inf would be NaN
            loss -= smoothing * (1.0 / C) * sum_d
        if not GRAD:
            tl.store(saved_ptr, m_s)
            tl.store(saved_ptr + saved_pitch, z_s)
            tl.store(saved_ptr + 2 * saved_pitch, m_t)
            tl.store(saved_ptr + 3 * saved_pitch, z_t)
    else:
        m_s = tl.load(saved_ptr)
        z_s = tl.load(saved_ptr + saved_pitch)
        m_t = tl.load(saved_ptr + 2 * saved_pitch)
        z_t = tl.load(saved_ptr + 3 * saved_pitch)
    share = row_share(n, weight_ptr, WEIGHTED)  # only now: the loop needs the registers
    if GRAD:
        coef = share * arrived(upstream_ptr, SCALED)
        c_q = coef * (1.0 - smoothing) / z_t
        c_1 = coef * smoothing * (1.0 / C)
        _store_gradient(s_ptr, t_ptr, g_ptr, m_s, m_t, rate, coef / z_s, c_q, c_1, C, W, BLOCK)
    return loss * share
