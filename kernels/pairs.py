"""Pieces of a kernel that works on a weak and a strong row of one image: sums, gradient, label.

Of the weak row w at temperature T and the strong row s, with d = x - max(x) and e_w = exp(d_w / T).
"""

import triton
import triton.language as tl

from mpl_fast.kernels.rows import LOG2E


@triton.jit
def rescaled(total, shift, z_w, scale):
    """sum e_w (v + shift) on the new scale of e_w; 0 where that vanishes, even if v is -inf."""
    return tl.where(scale == 0.0, 0.0, scale * (total + shift * z_w))


@triton.jit
def fold_pair(w, s, start, m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s, inv_t):
    """Takes a block of both rows into maxima, Z, arg-maxes, sum e_w d_w / T and sum e_w d_s."""
    block_w, at_w = tl.max(w, 0, return_indices=True)
    block_s, at_s = tl.max(s, 0, return_indices=True)
    top_w = tl.where(block_w > m_w, start + at_w, top_w)
    top_s = tl.where(block_s > m_s, start + at_s, top_s)
    max_w = tl.maximum(m_w, block_w)
    max_s = tl.maximum(m_s, block_s)
    step_w = tl.where(z_w == 0.0, 0.0, (m_w - max_w) * inv_t)
    step_s = tl.where(z_s == 0.0, 0.0, m_s - max_s)
    scale_w = tl.exp2(step_w * LOG2E)
    a_w = rescaled(a_w, step_w, z_w, scale_w)
    dot = rescaled(dot, step_s, z_w, scale_w)
    d_w = (w - max_w) * inv_t  # subtract first: w / T overflows where T is tiny
    d_s = s - max_s
    e_w = tl.exp2(d_w * LOG2E)
    z_w = z_w * scale_w + tl.sum(e_w, 0)
    z_s = z_s * tl.exp2(step_s * LOG2E) + tl.sum(tl.exp2(d_s * LOG2E), 0)
    a_w += tl.sum(tl.where(e_w > 0, e_w * d_w, 0.0), 0)
    dot += tl.sum(tl.where(e_w > 0, e_w * d_s, 0.0), 0)
    return max_w, z_w, a_w, top_w, max_s, z_s, dot, top_s


@triton.jit
def pair_gradient(w, s, offs, m_w, m_s, inv_t, y, c_p, c_q, c_y):
    """c_p exp(d_s) - c_q exp(d_w / T) - c_y 1[y] of a block."""
    g = tl.exp2((s - m_s) * LOG2E) * c_p - tl.exp2((w - m_w) * inv_t * LOG2E) * c_q
    return tl.where(offs == y, g - c_y, g)


@triton.jit
def pair_label(
    given_ptr,
    label_ptr,
    top_w,
    top_s,
    C: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_STRONG: tl.constexpr,
):
    """A pair's pseudo label, and a factor of the feedback: NaN if the given label is impossible."""
    valid = 1.0
    if GIVEN:
        given = tl.load(given_ptr)
        bad = (given < 0) | (given >= C)
        valid = tl.where(bad, float("nan"), 1.0)
        y = tl.where(bad, 0, given).to(tl.int32)
        tl.store(label_ptr, given)
    else:
        # A row of NaN has no arg-max: keep the index inside the row whatever came out.
        y = tl.minimum(top_s if FROM_STRONG else top_w, C - 1)
        tl.store(label_ptr, y.to(tl.int64))
    return y, valid
