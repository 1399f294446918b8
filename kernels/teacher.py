"""The teacher's whole loss in one launch: three terms, their statistics and the gradient.

One program takes one labeled row, or one (weak, strong) pair of rows, and reads each logit from
memory once where a row fits into registers (SINGLE), else twice. With d = x - max(x), T the
temperature, n the number of rows of a kind, and of a pair w and s:

    q = exp(d_w / T) / Z_w      conf = 1 / Z_w      mask = conf >= threshold
    uda = mask (log Z_s - sum q d_s) / n            mpl = (log Z_s - d_s[y]) / n
    dL/ds = (a_u + a_m) softmax(s) - a_u q - a_m 1[y]

    a_u = (u_loss uda_weight + u_uda) mask / n      a_m = (u_loss h + u_mpl) / n

where u are the gradients that arrive from above. A program does what it is compiled for: STATS (it
leaves each row's maximum and Z behind), GRAD (it takes them up again and reads each logit once,
however long the row), or both at once.

Statistics leave as one column of partial sums for each program, already divided by n, which the
caller adds up: unlike atomics that is deterministic. Online softmax: arXiv 1805.02867.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.pairs import pair_program
from mpl_fast.kernels.rows import inverse, labeled_row, zero_row

# The rows of `part_ptr`. The first four have a gradient.
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
    saved_ptr,
    n_rows,
    part_ptr,
    pitch,
    target,
    inv_n,
    upstream,
    smoothing,
    ignore_index,
    C: tl.constexpr,
    W: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A labeled row: loss, gradient, statistics."""
    ignored = target == ignore_index
    # Not checked on the host: a label out of range shows as NaN, never as a stray read.
    bad = (target < 0) | (target >= C)
    share = tl.where(bad, float("nan"), inv_n)
    safe = tl.where(ignored | bad, 0, target)
    coef = tl.where(ignored, 0.0, share * upstream)
    m = 0.0
    z = 0.0
    if not STATS:
        m = tl.load(saved_ptr)
        z = tl.load(saved_ptr + n_rows)
    loss, top, m, z = labeled_row(
        x_ptr, g_ptr, m, z, safe, coef, smoothing, C, W, STATS, GRAD, SINGLE, BLOCK
    )
    if STATS:
        loss = tl.where(ignored, 0.0, loss * share)
        hit = tl.where(top == target, inv_n, 0.0)
        _store_column(part_ptr, pitch, loss, loss, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, hit)
        if not GRAD:
            tl.store(saved_ptr, m)
            tl.store(saved_ptr + n_rows, z)


# The counts must not be compiled in: every last, smaller batch would be a new kernel. Nor where
# single numbers lie: 16-byte alignment widens accesses to rows alone, and a weight or labels that
# are a view into a larger tensor would be a new kernel, in the middle of a run or a capture.
@triton.jit(
    do_not_specialize=["n_l", "n_u", "ignore_index"],
    do_not_specialize_on_alignment=[
        "target_ptr",
        "given_ptr",
        "truth_ptr",
        "label_ptr",
        "part_ptr",
        "saved_ptr",
        "uda_weight_ptr",
        "feedback_ptr",
        "u_loss_ptr",
        "u_sup_ptr",
        "u_uda_ptr",
        "u_mpl_ptr",
    ],
)
def teacher_kernel(
    x_ptr,  # (n_l + 2 n_u, W) rows labeled | weak | strong
    x_stride,
    g_ptr,  # like x, written if GRAD
    g_stride,
    target_ptr,  # (n_l,) int64
    given_ptr,  # (n_u,) int64 if GIVEN
    truth_ptr,  # (n_u,) int64 if HAS_TRUTH
    label_ptr,  # (n_u,) int64, written if STATS
    part_ptr,  # (len(STATISTICS), n_l + n_u) float32, written if STATS
    saved_ptr,  # (2, n_l + 2 n_u) float32: maxima and Z, written if STATS alone, read if GRAD alone
    uda_weight_ptr,  # float32, as the next five
    feedback_ptr,
    u_loss_ptr,  # if UPSTREAM: the gradient that arrives for the loss, else 1
    u_sup_ptr,  # if UPSTREAM == 4: the same for its terms, else 0
    u_uda_ptr,
    u_mpl_ptr,
    n_l,
    n_u,
    inv_t,
    threshold,
    smoothing,
    ignore_index,
    C: tl.constexpr,
    W: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    UPSTREAM: tl.constexpr,
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
    # tl.cast, since inductor hands floats over as float64, and a count of 1 as a constant.
    n_l = tl.cast(n_l, tl.int64)
    n_u = tl.cast(n_u, tl.int64)
    inv_t = tl.cast(inv_t, tl.float32)
    threshold = tl.cast(threshold, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    pitch = n_l + n_u
    n_rows = pitch + n_u
    x_row = x_ptr + row * x_stride
    g_row = g_ptr + row * g_stride
    upstream = 1.0
    if UPSTREAM > 0:
        upstream = tl.load(u_loss_ptr)
    if row < n_l:
        if UPSTREAM == 4:
            upstream += tl.load(u_sup_ptr)
        _labeled_program(
            x_row,
            g_row,
            saved_ptr + row,
            n_rows,
            part_ptr + row,
            pitch,
            tl.load(target_ptr + row),
            inverse(n_l),
            upstream,
            smoothing,
            ignore_index,
            C,
            W,
            STATS,
            GRAD,
            SINGLE,
            BLOCK,
        )
    else:
        u = row - n_l
        uda_upstream = upstream * tl.load(uda_weight_ptr)
        mpl_upstream = upstream * tl.load(feedback_ptr)
        if UPSTREAM == 4:
            uda_upstream += tl.load(u_uda_ptr)
            mpl_upstream += tl.load(u_mpl_ptr)
        uda, mpl, mask, confidence, entropy, hit = pair_program(
            x_row,
            x_row + n_u * x_stride,
            g_row + n_u * g_stride,
            saved_ptr + row,
            saved_ptr + row + n_u,
            n_rows,
            given_ptr + u,
            truth_ptr + u,
            label_ptr + u,
            n_u,
            uda_upstream,
            mpl_upstream,
            inv_t,
            threshold,
            C,
            W,
            STATS,
            GRAD,
            GIVEN,
            FROM_STRONG,
            HAS_TRUTH,
            SINGLE,
            BLOCK,
        )
        if STATS:
            # Loaded again: to hold them takes registers that the loop over the rows needs.
            loss = tl.load(uda_weight_ptr) * uda + tl.load(feedback_ptr) * mpl
            _store_column(
                part_ptr + row, pitch, loss, 0.0, uda, mpl, mask, confidence, entropy, hit, 0.0
            )
        if GRAD:
            zero_row(g_row, W, BLOCK)
