"""The cosine loss, 1 - cos(softmax(s), softmax(t / T)) of masked rows, and its gradient.

One program takes one row s with its target's logits t and reads each logit once, however long the
row. The cosine does not depend on scale, so that no softmax need be normalized: with
e = exp(s - max(s)) and f = exp((t - max(t)) / T),

    cos = sum e f / sqrt(E F)      E = sum e^2      F = sum f^2
    dcos/ds_j = e_j (f_j / sqrt(E F) - cos e_j / E)

The softmax's Jacobian has one more term, the mean of this gradient under p, but that is always 0.
The backward pass recomputes the gradient from the logits, which is exact for every gradient with
respect to the loss; both maxima and the factors 1 / sqrt(E F) and cos / E are saved for it.
f is taken to the base of 2, as 2 ** (rate (t - max(t))): one product less for each logit.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import dense_rows, differentiable, register, wrap_triton
from mpl_fast.kernels.outputs import CosineOut
from mpl_fast.kernels.rows import LOG2E, LOWEST, aligned, inverse, load_block, store_block


@triton.jit
def _fold(s, t, sums, rate):
    """Adds a block of both rows to maxima, E, sum f, F and sum e f."""
    m_s, ee, m_t, z_t, ff, ef = sums
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


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["saved_ptr", "part_ptr"],
)
def cosine_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    target_ptr,  # (rows, C)
    target_stride,
    saved_ptr,  # (4, rows) float32, written
    part_ptr,  # (2, rows) float32, written: shares of the loss and of the mask rate
    rows,
    inv_t,
    threshold,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2**31 elements
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    t_row = target_ptr + row * aligned(target_stride, ALIGN)
    # tl.cast: inductor passes floats as float64.
    inv_rows = inverse(rows)
    rate = tl.cast(inv_t, tl.float32) * LOG2E
    threshold = tl.cast(threshold, tl.float32)
    lowest = tl.full([], LOWEST, tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    sums = lowest, zero, lowest, zero, zero, zero
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        sums = _fold(load_block(x_row, offs, C), load_block(t_row, offs, C), sums, rate)
    m_s, ee, m_t, z_t, ff, ef = sums
    lengths = tl.sqrt_rn(ee * ff)
    z_t = tl.where(z_t == 0.0, float("nan"), z_t)  # all classes at -inf
    conf = tl.div_rn(1.0, z_t)  # rounded as PyTorch's division: it is compared
    cos = tl.div_rn(ef, lengths)  # of a row all at -inf: 0 / 0, NaN as in PyTorch
    mask = tl.where(conf >= threshold, 1.0, 0.0)
    # Times and not where: a NaN must propagate through the mask.
    tl.store(part_ptr + row, (1.0 - cos) * mask * inv_rows)
    tl.store(part_ptr + rows + row, mask * inv_rows)
    tl.store(saved_ptr + row, m_s)
    tl.store(saved_ptr + rows + row, m_t)
    tl.store(saved_ptr + 2 * rows + row, mask * inv_rows / lengths)
    tl.store(saved_ptr + 3 * rows + row, mask * inv_rows * cos / ee)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["saved_ptr", "upstream_ptr"],
)
def cosine_gradient_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    target_ptr,  # (rows, C)
    target_stride,
    saved_ptr,  # (4, rows) float32, of `cosine_kernel`
    upstream_ptr,  # a number: the gradient with respect to the loss
    g_ptr,  # (rows, C), written
    rows,
    inv_t,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    t_row = target_ptr + row * aligned(target_stride, ALIGN)
    rate = tl.cast(inv_t, tl.float32) * LOG2E
    upstream = tl.load(upstream_ptr).to(tl.float32)
    m_s = tl.load(saved_ptr + row)
    m_t = tl.load(saved_ptr + rows + row)
    c_f = upstream * tl.load(saved_ptr + 2 * rows + row)
    c_e = upstream * tl.load(saved_ptr + 3 * rows + row)
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        e = tl.exp2((load_block(x_row, offs, C) - m_s) * LOG2E)
        f = tl.exp2((load_block(t_row, offs, C) - m_t) * rate)
        store_block(g_ptr + row * C, offs, e * (c_e * e - c_f * f), C)


def _cosine(
    x: Tensor, constants: list[Tensor], temperature: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Shares of loss and mask rate (2, rows), and what the gradient needs. constants: targets."""
    rows = x.shape[0]
    part = x.new_empty((2, rows), dtype=torch.float32)
    saved = x.new_empty((4, rows), dtype=torch.float32)
    wrap_triton(cosine_kernel, rows, x, *constants)(
        saved, part, rows, 1.0 / temperature, float(threshold)
    )
    return part, saved


def _cosine_gradient(
    x: Tensor,
    constants: list[Tensor],
    temperature: float,
    threshold: float,
    saved: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The gradient (rows, C); the threshold is in the numbers of `_cosine` already."""
    gradient = x.new_empty(x.shape)
    wrap_triton(cosine_gradient_kernel, x.shape[0], x, *constants)(
        saved, upstream, gradient, x.shape[0], 1.0 / temperature
    )
    return gradient


_loss = differentiable(
    register("mpl_fast::cosine", _cosine),
    register("mpl_fast::cosine_gradient", _cosine_gradient),
)


def cosine_loss(logits: Tensor, target: Tensor, temperature: float, threshold: float) -> CosineOut:
    """`losses.cosine_loss`. 2 launches forward, 1 backward; all is read twice, written once."""
    x, fixed = dense_rows(logits), dense_rows(target.detach())
    return CosineOut._make(_loss(x, [fixed], (temperature, threshold)))
