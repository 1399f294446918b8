"""The cosine loss in one launch, 1 - cos(softmax(s), q) of masked rows, its gradient in another.

One program takes one row s with its target and reads each logit once, however long the row. The
cosine does not see scale, so that no softmax need be normalized: with e = exp(s - max(s)), and
f = 1[y] of a label y or f = exp((t - max(t)) / T) of a teacher's logits t,

    cos = sum e f / sqrt(E F)      E = sum e^2      F = sum f^2
    dcos/ds_j = e_j (f_j / sqrt(E F) - cos e_j / E)

The softmax's Jacobian has one more term, the mean of this gradient under p, but that is always 0.
The factors 1 / sqrt(E F) and cos / E are left behind for the gradient, along with both maxima.
f is taken to the base of 2, as 2 ** (rate (t - max(t))): one product less for each logit.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.rows import LOG2E, LOWEST, inverse, load_block, store_block


@triton.jit
def _fold_hard(s, m_s, ee):
    """Takes a block into maximum and E."""
    max_s = tl.maximum(m_s, tl.max(s, 0))
    scale = tl.exp2((m_s - max_s) * LOG2E)
    e = tl.exp2((s - max_s) * LOG2E)
    return max_s, ee * scale * scale + tl.sum(e * e, 0)


@triton.jit
def _fold_soft(s, t, m_s, ee, m_t, z_t, ff, ef, rate):
    """Takes a block of both rows into maxima, E, sum f, F and sum e f."""
    max_s = tl.maximum(m_s, tl.max(s, 0))
    max_t = tl.maximum(m_t, tl.max(t, 0))
    scale_s = tl.exp2((m_s - max_s) * LOG2E)
    scale_t = tl.exp2((m_t - max_t) * rate)
    e = tl.exp2((s - max_s) * LOG2E)
    f = tl.exp2((t - max_t) * rate)  # subtract first: t / T overflows where T is tiny
    ee = ee * scale_s * scale_s + tl.sum(e * e, 0)
    z_t = z_t * scale_t + tl.sum(f, 0)
    ff = ff * scale_t * scale_t + tl.sum(f * f, 0)
    ef = ef * scale_s * scale_t + tl.sum(e * f, 0)
    return max_s, ee, max_t, z_t, ff, ef


@triton.jit
def _hard_row(s_ptr, y, C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row with a label: maximum, sum e f, sqrt(E F), E."""
    m_s = tl.full([], LOWEST, tl.float32)
    ee = tl.full([], 0.0, tl.float32)
    for i in range(0, W, BLOCK):
        s = load_block(s_ptr, i + tl.arange(0, BLOCK), C, W)
        m_s, ee = _fold_hard(s, m_s, ee)
    e_y = tl.exp2((tl.load(s_ptr + y).to(tl.float32) - m_s) * LOG2E)
    return m_s, e_y, tl.sqrt_rn(ee), ee


@triton.jit
def _soft_row(s_ptr, t_ptr, rate, C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row with a teacher's row: both maxima, the teacher's Z, sum e f, sqrt(E F), E."""
    m_s = tl.full([], LOWEST, tl.float32)
    m_t = tl.full([], LOWEST, tl.float32)
    ee = tl.full([], 0.0, tl.float32)
    z_t = tl.full([], 0.0, tl.float32)
    ff = tl.full([], 0.0, tl.float32)
    ef = tl.full([], 0.0, tl.float32)
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        s = load_block(s_ptr, offs, C, W)
        t = load_block(t_ptr, offs, C, W)
        m_s, ee, m_t, z_t, ff, ef = _fold_soft(s, t, m_s, ee, m_t, z_t, ff, ef, rate)
    return m_s, m_t, z_t, ef, tl.sqrt_rn(ee * ff), ee


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["label_ptr", "saved_ptr", "part_ptr"],
)
def cosine_kernel(
    x_ptr,  # (rows, W)
    x_stride,
    label_ptr,  # (rows,) int64, unless SOFT
    soft_ptr,  # (rows, W) logits if SOFT
    soft_stride,
    saved_ptr,  # (4, rows) float32, written
    part_ptr,  # (2, rows) float32, written: shares of the loss and of the mask rate
    rows,
    inv_t,
    threshold,
    C: tl.constexpr,
    W: tl.constexpr,
    SOFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 logits
    # Tells the compiler that rows are aligned: see `student_kernel`.
    x_row = x_ptr + row * ((x_stride // ALIGN) * ALIGN)
    # tl.cast: inductor hands floats over as float64.
    inv_rows = inverse(rows)
    inv_t = tl.cast(inv_t, tl.float32)
    threshold = tl.cast(threshold, tl.float32)
    conf = tl.full([], 1.0, tl.float32)  # a label is sure of itself
    m_t = tl.full([], 0.0, tl.float32)
    if SOFT:
        t_row = soft_ptr + row * ((soft_stride // ALIGN) * ALIGN)
        m_s, m_t, z_t, ef, lengths, ee = _soft_row(x_row, t_row, inv_t * LOG2E, C, W, BLOCK)
        z_t = tl.where(z_t == 0.0, float("nan"), z_t)  # all classes at -inf
        conf = tl.div_rn(1.0, z_t)  # rounded as PyTorch's division: it is compared
    else:
        y = tl.load(label_ptr + row)
        # Not checked on the host: a label out of range shows as NaN, never as a stray read.
        bad = (y < 0) | (y >= C)
        m_s, ef, lengths, ee = _hard_row(x_row, tl.where(bad, 0, y), C, W, BLOCK)
        ef = tl.where(bad, float("nan"), ef)
    cos = tl.div_rn(ef, lengths)  # of a row all at -inf: 0 / 0, NaN as in PyTorch
    mask = tl.where(conf >= threshold, 1.0, 0.0)
    # Times and not where: a NaN must survive the mask.
    tl.store(part_ptr + row, (1.0 - cos) * mask * inv_rows)
    tl.store(part_ptr + rows + row, mask * inv_rows)
    tl.store(saved_ptr + row, m_s)
    tl.store(saved_ptr + rows + row, m_t)
    tl.store(saved_ptr + 2 * rows + row, mask * inv_rows / lengths)
    tl.store(saved_ptr + 3 * rows + row, mask * inv_rows * cos / ee)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["label_ptr", "saved_ptr", "upstream_ptr"],
)
def cosine_gradient_kernel(
    x_ptr,  # (rows, W)
    x_stride,
    label_ptr,  # (rows,) int64, unless SOFT
    soft_ptr,  # (rows, W) logits if SOFT
    soft_stride,
    saved_ptr,  # (4, rows) float32, of `cosine_kernel`
    upstream_ptr,  # a number: the gradient from above
    g_ptr,  # (rows, W), written
    rows,
    inv_t,
    C: tl.constexpr,
    W: tl.constexpr,
    SOFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * ((x_stride // ALIGN) * ALIGN)
    g_row = g_ptr + row * W
    inv_t = tl.cast(inv_t, tl.float32)
    upstream = tl.load(upstream_ptr).to(tl.float32)
    m_s = tl.load(saved_ptr + row)
    m_t = tl.load(saved_ptr + rows + row)
    c_f = upstream * tl.load(saved_ptr + 2 * rows + row)
    c_e = upstream * tl.load(saved_ptr + 3 * rows + row)
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        e = tl.exp2((load_block(x_row, offs, C, W) - m_s) * LOG2E)
        if SOFT:
            t_row = soft_ptr + row * ((soft_stride // ALIGN) * ALIGN)
            f = tl.exp2((load_block(t_row, offs, C, W) - m_t) * (inv_t * LOG2E))
        else:
            f = tl.where(offs == tl.load(label_ptr + row), 1.0, 0.0)
        store_block(g_row, offs, e * (c_e * e - c_f * f), C, W)
