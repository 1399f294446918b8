"""The exact feedback in one launch, weight / n times the sum of u softmax(z / T), and its gradient.

One program takes one row z with its direction u and reads both once, however long the row. With
q = softmax(z / T) and n rows,

    value = weight / n sum_c u_c q_c      dvalue/dz_c = weight / (n T) q_c (u_c - mean)

where mean = sum_k u_k q_k. A row's maximum, Z and mean are left behind for the gradient.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.rows import LOG2E, LOWEST, inverse, load_block, store_block


@triton.jit
def _load_direction(u_ptr, offs, C: tl.constexpr, W: tl.constexpr):
    """A block of a row of u as float32, 0 beyond C."""
    u = tl.load(u_ptr + offs, mask=offs < W, other=0.0).to(tl.float32)
    if W != C:
        u = tl.where(offs < C, u, 0.0)
    return u


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["weight_ptr", "saved_ptr", "part_ptr"],
)
def exact_kernel(
    x_ptr,  # (rows, W)
    x_stride,
    direction_ptr,  # (rows, W)
    direction_stride,
    weight_ptr,  # a number
    saved_ptr,  # (3, rows) float32, written
    part_ptr,  # (rows,) float32, written: shares of the value
    rows,
    inv_t,
    C: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 logits
    # Tells the compiler that rows are aligned: see `student_kernel`.
    x_row = x_ptr + row * ((x_stride // ALIGN) * ALIGN)
    u_row = direction_ptr + row * ((direction_stride // ALIGN) * ALIGN)
    # tl.cast: inductor hands floats over as float64.
    inv_rows = inverse(rows)
    inv_t = tl.cast(inv_t, tl.float32)
    rate = inv_t * LOG2E  # of exponents to the base of 2: one product less for each logit
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    dot = tl.full([], 0.0, tl.float32)
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        x = load_block(x_row, offs, C, W)
        m_new = tl.maximum(m, tl.max(x, 0))
        scale = tl.exp2((m - m_new) * rate)
        e = tl.exp2((x - m_new) * rate)  # subtract first: x / T overflows if T is tiny
        z = z * scale + tl.sum(e, 0)
        dot = dot * scale + tl.sum(e * _load_direction(u_row, offs, C, W), 0)
        m = m_new
    mean = dot / z  # of a row all at -inf: 0 / 0, NaN as in PyTorch
    tl.store(part_ptr + row, tl.load(weight_ptr).to(tl.float32) * inv_rows * mean)
    tl.store(saved_ptr + row, m)
    tl.store(saved_ptr + rows + row, z)
    tl.store(saved_ptr + 2 * rows + row, mean)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["weight_ptr", "saved_ptr", "upstream_ptr"],
)
def exact_gradient_kernel(
    x_ptr,  # (rows, W)
    x_stride,
    direction_ptr,  # (rows, W)
    direction_stride,
    weight_ptr,  # a number
    saved_ptr,  # (3, rows) float32, of `exact_kernel`
    upstream_ptr,  # a number: the gradient from above
    g_ptr,  # (rows, W), written
    rows,
    inv_t,
    C: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * ((x_stride // ALIGN) * ALIGN)
    u_row = direction_ptr + row * ((direction_stride // ALIGN) * ALIGN)
    inv_rows = inverse(rows)
    inv_t = tl.cast(inv_t, tl.float32)
    rate = inv_t * LOG2E
    m = tl.load(saved_ptr + row)
    z = tl.load(saved_ptr + rows + row)
    mean = tl.load(saved_ptr + 2 * rows + row)
    coef = tl.load(upstream_ptr).to(tl.float32) * tl.load(weight_ptr).to(tl.float32)
    coef *= inv_rows * inv_t / z
    for i in range(0, W, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        e = tl.exp2((load_block(x_row, offs, C, W) - m) * rate)
        u = _load_direction(u_row, offs, C, W)
        store_block(g_ptr + row * W, offs, coef * e * (u - mean), C, W)
