"""What a kernel does to the weak and the strong row of one image: sums, label, loss, gradient.

Of the weak row w at temperature T and the strong row s, with d = x - max(x) and e_w = exp(d_w / T).
"""

import triton
import triton.language as tl

from mpl_fast.kernels.rows import LOG2E, LOWEST, inverse, load_block, store_block


@triton.jit
def rescaled(total, shift, z_w, scale):
    """sum e_w (v + shift) on the new scale of e_w; 0 where that vanishes, even if v is -inf."""
    return tl.where(scale == 0.0, 0.0, scale * (total + shift * z_w))


@triton.jit
def start_pair():
    """What `fold_pair` starts from."""
    m = tl.full([], LOWEST, tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    top = tl.full([], 0, tl.int32)
    return m, zero, zero, top, m, zero, zero, top


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
def sum_pair(w_ptr, s_ptr, inv_t, C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """What `fold_pair` makes of two whole rows, block by block."""
    m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = start_pair()
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C, W)
        s = load_block(s_ptr, offs, C, W)
        m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = fold_pair(
            w, s, i, m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s, inv_t
        )
    return m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s


@triton.jit
def store_pair_gradient(
    w_ptr,
    s_ptr,
    g_ptr,
    m_w,
    m_s,
    inv_t,
    y,
    c_p,
    c_q,
    c_y,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes `pair_gradient` of two whole rows, block by block."""
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C, W)
        s = load_block(s_ptr, offs, C, W)
        g = pair_gradient(w, s, offs, m_w, m_s, inv_t, y, c_p, c_q, c_y)
        store_block(g_ptr, offs, g, C, W)


@triton.jit
def known(given, C: tl.constexpr):
    """A label to compute with, and a factor of its loss: NaN if there is no such class."""
    bad = (given < 0) | (given >= C)
    return tl.where(bad, 0, given).to(tl.int32), tl.where(bad, float("nan"), 1.0)


@triton.jit
def pair_program(
    w_ptr,
    s_ptr,
    g_ptr,
    weak_saved_ptr,
    strong_saved_ptr,
    n_rows,
    given_ptr,
    truth_ptr,
    label_ptr,
    n,
    uda_upstream,
    mpl_upstream,
    inv_t,
    threshold,
    C: tl.constexpr,
    W: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_STRONG: tl.constexpr,
    HAS_TRUTH: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A weak and a strong row of one image: shares of the statistics, the strong row's gradient.

    Returns those of uda, mpl, mask rate, confidence, entropy and labels that are the truth.
    """
    m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = start_pair()
    if SINGLE:
        offs = tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C, W)
        s = load_block(s_ptr, offs, C, W)
    if STATS:
        if SINGLE:
            m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = fold_pair(
                w, s, 0, m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s, inv_t
            )
        else:
            m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = sum_pair(w_ptr, s_ptr, inv_t, C, W, BLOCK)
        z_w = tl.where(z_w == 0.0, float("nan"), z_w)  # all classes at -inf
        z_s = tl.where(z_s == 0.0, float("nan"), z_s)
        if not GRAD:
            tl.store(weak_saved_ptr, m_w)
            tl.store(weak_saved_ptr + n_rows, z_w)
            tl.store(strong_saved_ptr, m_s)
            tl.store(strong_saved_ptr + n_rows, z_s)
    else:
        m_w = tl.load(weak_saved_ptr)
        z_w = tl.load(weak_saved_ptr + n_rows)
        m_s = tl.load(strong_saved_ptr)
        z_s = tl.load(strong_saved_ptr + n_rows)

    if GIVEN:
        label = tl.load(given_ptr)
    else:
        # A row of NaN has no arg-max: keep the index inside the row whatever came out.
        label = tl.minimum(top_s if FROM_STRONG else top_w, C - 1).to(tl.int64)
    y, valid = known(label, C)
    inv_n = inverse(n)  # only now: the loop over the rows needs the registers
    conf = tl.div_rn(1.0, z_w)  # rounded as PyTorch's division: it is compared
    mask = tl.where(conf >= threshold, 1.0, 0.0)
    if GRAD:
        a_u = uda_upstream * mask * inv_n
        a_m = mpl_upstream * valid * inv_n
        c_p = (a_u + a_m) / z_s
        c_q = a_u * conf
        if SINGLE:
            g = pair_gradient(w, s, offs, m_w, m_s, inv_t, y, c_p, c_q, a_m)
            store_block(g_ptr, offs, g, C, W)
        else:
            store_pair_gradient(w_ptr, s_ptr, g_ptr, m_w, m_s, inv_t, y, c_p, c_q, a_m, C, W, BLOCK)
    uda = 0.0
    mpl = 0.0
    entropy = 0.0
    hit = 0.0
    if STATS:
        tl.store(label_ptr, label)
        log_z_s = tl.log(z_s)
        uda = (log_z_s - dot * conf) * mask * inv_n  # times and not where: NaN must survive
        mpl = (log_z_s - (tl.load(s_ptr + y).to(tl.float32) - m_s)) * valid * inv_n
        entropy = (tl.log(z_w) - a_w * conf) * inv_n
        if HAS_TRUTH:
            hit = tl.where(tl.load(truth_ptr) == label, inv_n, 0.0)
    return uda, mpl, mask * inv_n, conf * inv_n, entropy, hit
