"""The student's loss in one launch: pseudo labels hard or soft, weights, the labeled cross-entropy.

One program takes one row, labeled or strong. With d = s - max(s) of a strong row s, a the label
smoothing, w the row's weight and n the number of strong rows, its pseudo label adds

    loss = w / n (log Z - (1 - a) sum q d - a mean d)      Z = sum exp(d)
    dL/ds = u w / n (softmax(s) - (1 - a) q - a / C)

where q is 1[y] of a hard label y, or softmax(t / T) of a teacher's logits t, and u is the gradient
that arrives from above. Labeled rows are only looked at: their gradient is 0. A program does what
it is compiled for: STATS (it leaves each row's maximum and Z behind), GRAD (it takes them up again
and reads each logit once, however long the row; labeled rows not at all), or both at once: a row
that fits into registers (SINGLE) is read once then, a longer one twice.

Statistics leave as one column of partial sums for each program, already divided by the number of
rows, which the caller adds up: unlike atomics that is deterministic.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.rows import LOG2E, inverse, labeled_row, zero_row
from mpl_fast.kernels.soft import arrived, row_share, soft_row

# The rows of `part_ptr`.
STATISTICS = ("loss", "labeled_ce", "labeled_accuracy")

# A target whose row adds 0 to the labeled cross-entropy and still counts as a row.
IGNORED = tl.constexpr(-100)


@triton.jit
def _store_column(part_ptr, pitch, loss, labeled_ce, labeled_hit):
    """One program's share of STATISTICS, in that order."""
    tl.store(part_ptr, loss)
    tl.store(part_ptr + pitch, labeled_ce)
    tl.store(part_ptr + 2 * pitch, labeled_hit)


@triton.jit
def _labeled_program(
    x_ptr,
    part_ptr,
    pitch,
    target,
    inv_n,
    C: tl.constexpr,
    W: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A labeled row: statistics."""
    # Not checked on the host: a label out of range shows as NaN, never as a stray read.
    bad = (target < 0) | (target >= C)
    safe = tl.where(bad, 0, target)
    ce, top, _, _ = labeled_row(
        x_ptr, x_ptr, 0.0, 0.0, safe, 0.0, 0.0, C, W, True, False, SINGLE, BLOCK
    )
    ce = tl.where(target == IGNORED, 0.0, tl.where(bad, float("nan"), ce * inv_n))
    _store_column(part_ptr, pitch, 0.0, ce, tl.where(top == target, inv_n, 0.0))


@triton.jit
def _hard_program(
    x_ptr,
    g_ptr,
    saved_ptr,
    saved_pitch,
    part_ptr,
    pitch,
    label,
    share,
    upstream,
    smoothing,
    C: tl.constexpr,
    W: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A strong row with a label: loss, gradient."""
    bad = (label < 0) | (label >= C)
    share = tl.where(bad, float("nan"), share)
    safe = tl.where(bad, 0, label)
    m = 0.0
    z = 0.0
    if not STATS:
        m = tl.load(saved_ptr)
        z = tl.load(saved_ptr + saved_pitch)
    loss, _, m, z = labeled_row(
        x_ptr, g_ptr, m, z, safe, share * upstream, smoothing, C, W, STATS, GRAD, SINGLE, BLOCK
    )
    if STATS:
        _store_column(part_ptr, pitch, loss * share, 0.0, 0.0)
        if not GRAD:
            tl.store(saved_ptr, m)
            tl.store(saved_ptr + saved_pitch, z)


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["n_l", "n_u"],
    do_not_specialize_on_alignment=[
        "target_ptr",
        "label_ptr",
        "weight_ptr",
        "upstream_ptr",
        "saved_ptr",
        "part_ptr",
    ],
)
def student_kernel(
    x_ptr,  # (n_l + n_u, W) rows labeled | strong
    x_stride,
    g_ptr,  # (n_l + n_u, W), written if GRAD
    target_ptr,  # (n_l,) int64
    label_ptr,  # (n_u,) int64, unless SOFT
    soft_ptr,  # (n_u, W) logits if SOFT
    soft_stride,
    weight_ptr,  # (n_u,) if WEIGHTED
    upstream_ptr,  # a number if SCALED
    saved_ptr,  # (2 or 4 if SOFT, n_u) float32, written if STATS and not GRAD
    part_ptr,  # (len(STATISTICS), n_l + n_u) float32, written if STATS
    n_l,
    n_u,
    inv_t,
    smoothing,
    C: tl.constexpr,
    W: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: n_l + n_u programs, in the order of the rows."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 logits
    # Tells the compiler that rows are aligned: it looks by itself for multiples of 16 only, and a
    # bfloat16 row of 1000 would be read two bytes at a time.
    x_stride = (x_stride // ALIGN) * ALIGN
    soft_stride = (soft_stride // ALIGN) * ALIGN
    # tl.cast: inductor hands floats over as float64, and a count of 1 as a constant.
    n_l = tl.cast(n_l, tl.int64)
    n_u = tl.cast(n_u, tl.int64)
    inv_t = tl.cast(inv_t, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    pitch = n_l + n_u
    x_row = x_ptr + row * x_stride
    g_row = g_ptr + row * W
    if row < n_l:
        if STATS:
            target = tl.load(target_ptr + row)
            inv_n = inverse(n_l)
            _labeled_program(x_row, part_ptr + row, pitch, target, inv_n, C, W, SINGLE, BLOCK)
        if GRAD:
            zero_row(g_row, W, BLOCK)
    else:
        u = row - n_l
        if SOFT:
            loss = soft_row(
                x_row,
                soft_ptr + u * soft_stride,
                g_row,
                saved_ptr + u,
                n_u,
                n_u,
                weight_ptr + u,
                upstream_ptr,
                inv_t * LOG2E,
                smoothing,
                C,
                W,
                WEIGHTED,
                SCALED,
                STATS,
                GRAD,
                BLOCK,
            )
            if STATS:
                _store_column(part_ptr + row, pitch, loss, 0.0, 0.0)
        else:
            _hard_program(
                x_row,
                g_row,
                saved_ptr + u,
                n_u,
                part_ptr + row,
                pitch,
                tl.load(label_ptr + u),
                row_share(n_u, weight_ptr + u, WEIGHTED),
                arrived(upstream_ptr, SCALED),
                smoothing,
                C,
                W,
                STATS,
                GRAD,
                SINGLE,
                BLOCK,
            )
