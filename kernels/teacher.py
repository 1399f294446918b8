"""The teacher's whole loss in one launch: three terms, their statistics and the gradient.

One program takes one labeled row, or one (weak, strong) pair of rows, and reads each logit from
memory once where a row fits into registers (SINGLE), else twice. With d = x - max(x), T the
temperature, n the number of rows of a kind, and of a pair w and s:

    q = exp(d_w / T) / Z_w      conf = 1 / Z_w      mask = conf >= threshold
    uda = mask (log Z_s - sum q d_s)                mpl = log Z_s - d_s[y]
    dL/ds = (a_u + a_m) softmax(s) - a_u q - a_m 1[y]     a_u = uda_weight mask / n   a_m = h / n

Statistics leave as one column of partial sums for each program, already divided by n, which the
caller adds up: unlike atomics that is deterministic. Online softmax: arXiv 1805.02867.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.pairs import fold_pair, pair_gradient, pair_label
from mpl_fast.kernels.rows import LOWEST, labeled_row, load_block, store_block, zero_row

# The rows of `part_ptr`.
STATISTICS = (
    "loss",
    "sup",
    "uda",
    "mpl",
    "mask_rate",
    "confidence",
    "entropy",
    "pseudo_accuracy",
    "labeled_accuracy",
)


@triton.jit
def _store_column(
    part_ptr, pitch, loss, sup, uda, mpl, mask, confidence, entropy, pseudo_hit, labeled_hit
):
    """One program's share of STATISTICS, in that order."""
    tl.store(part_ptr, loss)
    tl.store(part_ptr + pitch, sup)
    tl.store(part_ptr + 2 * pitch, uda)
    tl.store(part_ptr + 3 * pitch, mpl)
    tl.store(part_ptr + 4 * pitch, mask)
    tl.store(part_ptr + 5 * pitch, confidence)
    tl.store(part_ptr + 6 * pitch, entropy)
    tl.store(part_ptr + 7 * pitch, pseudo_hit)
    tl.store(part_ptr + 8 * pitch, labeled_hit)


@triton.jit
def _labeled_program(
    x_ptr,
    g_ptr,
    part_ptr,
    pitch,
    target,
    inv_n_l,
    smoothing,
    ignore_index,
    C: tl.constexpr,
    W: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A labeled row: loss, gradient, statistics."""
    ignored = target == ignore_index
    # Not checked on the host: a label out of range shows as NaN, never as a stray read.
    bad = (target < 0) | (target >= C)
    coef = tl.where(ignored, 0.0, tl.where(bad, float("nan"), inv_n_l))
    safe = tl.where(ignored | bad, 0, target)
    loss, top = labeled_row(x_ptr, g_ptr, safe, coef, smoothing, C, W, HAS_GRAD, SINGLE, BLOCK)
    loss = tl.where(ignored, 0.0, loss * coef)
    hit = tl.where(top == target, inv_n_l, 0.0)
    _store_column(part_ptr, pitch, loss, loss, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, hit)


@triton.jit
def _pair_program(
    w_ptr,
    s_ptr,
    g_ptr,
    part_ptr,
    pitch,
    given_ptr,
    truth_ptr,
    label_ptr,
    uda_weight,
    feedback,
    inv_n_u,
    inv_t,
    threshold,
    C: tl.constexpr,
    W: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_STRONG: tl.constexpr,
    HAS_TRUTH: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weak and the strong row of one image: losses, the strong row's gradient, statistics."""
    m_w = tl.full([], LOWEST, tl.float32)
    m_s = tl.full([], LOWEST, tl.float32)
    z_w = tl.full([], 0.0, tl.float32)
    z_s = tl.full([], 0.0, tl.float32)
    a_w = tl.full([], 0.0, tl.float32)
    dot = tl.full([], 0.0, tl.float32)
    top_w = tl.full([], 0, tl.int32)
    top_s = tl.full([], 0, tl.int32)
    if SINGLE:
        offs = tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C, W)
        s = load_block(s_ptr, offs, C, W)
        m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = fold_pair(
            w, s, 0, m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s, inv_t
        )
    else:
        for i in range(0, W, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            w = load_block(w_ptr, offs, C, W)
            s = load_block(s_ptr, offs, C, W)
            m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s = fold_pair(
                w, s, i, m_w, z_w, a_w, top_w, m_s, z_s, dot, top_s, inv_t
            )
    z_w = tl.where(z_w == 0.0, float("nan"), z_w)  # all classes at -inf
    z_s = tl.where(z_s == 0.0, float("nan"), z_s)

    y, valid = pair_label(given_ptr, label_ptr, top_w, top_s, C, GIVEN, FROM_STRONG)
    conf = tl.div_rn(1.0, z_w)  # rounded as PyTorch's division: it is compared
    mask = tl.where(conf >= threshold, 1.0, 0.0)
    a_u = uda_weight * mask * inv_n_u
    a_m = feedback * valid * inv_n_u
    if HAS_GRAD:
        c_p = (a_u + a_m) / z_s
        c_q = a_u * conf
        if SINGLE:
            g = pair_gradient(w, s, offs, m_w, m_s, inv_t, y, c_p, c_q, a_m)
            store_block(g_ptr, offs, g, C, W)
        else:
            for i in range(0, W, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                w = load_block(w_ptr, offs, C, W)
                s = load_block(s_ptr, offs, C, W)
                g = pair_gradient(w, s, offs, m_w, m_s, inv_t, y, c_p, c_q, a_m)
                store_block(g_ptr, offs, g, C, W)

    log_z_s = tl.log(z_s)
    uda = (log_z_s - dot * conf) * mask * inv_n_u  # times and not where: NaN must survive
    mpl = (log_z_s - (tl.load(s_ptr + y).to(tl.float32) - m_s)) * valid * inv_n_u
    entropy = (tl.log(z_w) - a_w * conf) * inv_n_u
    hit = 0.0
    if HAS_TRUTH:
        hit = tl.where(tl.load(truth_ptr) == y, inv_n_u, 0.0)
    loss = uda_weight * uda + feedback * mpl
    _store_column(
        part_ptr, pitch, loss, 0.0, uda, mpl, mask * inv_n_u, conf * inv_n_u, entropy, hit, 0.0
    )


# The counts must not be compiled in: every last, smaller batch would be a new kernel.
@triton.jit(do_not_specialize=["n_l", "n_u", "ignore_index"])
def teacher_kernel(
    x_ptr,  # (n_l + 2 n_u, W) rows labeled | weak | strong
    x_stride,
    g_ptr,  # like x; not touched without HAS_GRAD
    g_stride,
    target_ptr,  # (n_l,) int64
    given_ptr,  # (n_u,) int64 if GIVEN
    truth_ptr,  # (n_u,) int64 if HAS_TRUTH
    label_ptr,  # (n_u,) int64, written
    part_ptr,  # (len(STATISTICS), n_l + n_u) float32, written
    uda_weight_ptr,  # float32
    feedback_ptr,  # float32
    n_l,
    n_u,
    inv_n_l,
    inv_n_u,
    inv_t,
    threshold,
    smoothing,
    ignore_index,
    C: tl.constexpr,
    W: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_STRONG: tl.constexpr,
    HAS_TRUTH: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: n_l + n_u programs, in the order of the rows."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 logits
    # Tells the compiler that rows are aligned: it looks by itself for multiples of 16 only, and a
    # bfloat16 row of 1000 would be read two bytes at a time.
    x_stride = (x_stride // ALIGN) * ALIGN
    g_stride = (g_stride // ALIGN) * ALIGN
    pitch = (n_l + n_u).to(tl.int64)
    x_row = x_ptr + row * x_stride
    g_row = g_ptr + row * g_stride
    if row < n_l:
        _labeled_program(
            x_row,
            g_row,
            part_ptr + row,
            pitch,
            tl.load(target_ptr + row),
            inv_n_l,
            smoothing,
            ignore_index,
            C,
            W,
            HAS_GRAD,
            SINGLE,
            BLOCK,
        )
    else:
        u = row - n_l
        down = n_u.to(tl.int64)  # rows from a weak view to its strong view
        _pair_program(
            x_row,
            x_row + down * x_stride,
            g_row + down * g_stride,
            part_ptr + row,
            pitch,
            given_ptr + u,
            truth_ptr + u,
            label_ptr + u,
            tl.load(uda_weight_ptr),
            tl.load(feedback_ptr),
            inv_n_u,
            inv_t,
            threshold,
            C,
            W,
            HAS_GRAD,
            GIVEN,
            FROM_STRONG,
            HAS_TRUTH,
            SINGLE,
            BLOCK,
        )
        if HAS_GRAD:
            zero_row(g_row, W, BLOCK)
