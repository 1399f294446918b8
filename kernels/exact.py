"""The exact feedback, weight / n times the sum of u softmax(z), and its gradient.

One program takes one row z with its direction u and reads both once, however long the row. With
q = softmax(z) and n rows,

    value = weight / n sum_c u_c q_c      dvalue/dz_c = weight / n q_c (u_c - mean)

where mean = sum_k u_k q_k. A row's maximum, Z and mean are saved for the backward pass, which
recomputes the gradient from the logits: that is exact for every gradient with respect to the value.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import (
    dense_rows,
    differentiable,
    on_device,
    register,
    wrap_triton,
)
from mpl_fast.kernels.outputs import Scalar
from mpl_fast.kernels.rows import LOG2E, LOWEST, aligned, inverse, load_block, store_block


@triton.jit
def _load_direction(u_ptr, offs, C: tl.constexpr):
    """A block of a row of u as float32, 0 from C on."""
    return tl.load(u_ptr + offs, mask=offs < C, other=0.0).to(tl.float32)


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["weight_ptr", "saved_ptr", "part_ptr"],
)
def exact_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    direction_ptr,  # (rows, C)
    direction_stride,
    weight_ptr,  # a number
    saved_ptr,  # (3, rows) float32, written
    part_ptr,  # (1, rows) float32, written: shares of the value
    rows,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2**31 elements
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    u_row = direction_ptr + row * aligned(direction_stride, ALIGN)
    inv_rows = inverse(rows)
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    dot = tl.full([], 0.0, tl.float32)
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        x = load_block(x_row, offs, C)
        m_new = tl.maximum(m, tl.max(x, 0))
        scale = tl.exp2((m - m_new) * LOG2E)
        e = tl.exp2((x - m_new) * LOG2E)
        z = z * scale + tl.sum(e, 0)
        dot = dot * scale + tl.sum(e * _load_direction(u_row, offs, C), 0)
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
    x_ptr,  # (rows, C)
    x_stride,
    direction_ptr,  # (rows, C)
    direction_stride,
    weight_ptr,  # a number
    saved_ptr,  # (3, rows) float32, of `exact_kernel`
    upstream_ptr,  # a number: the gradient with respect to the value
    g_ptr,  # (rows, C), written
    rows,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    u_row = direction_ptr + row * aligned(direction_stride, ALIGN)
    m = tl.load(saved_ptr + row)
    z = tl.load(saved_ptr + rows + row)
    mean = tl.load(saved_ptr + 2 * rows + row)
    coef = tl.load(upstream_ptr).to(tl.float32) * tl.load(weight_ptr).to(tl.float32)
    coef *= inverse(rows) / z
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        e = tl.exp2((load_block(x_row, offs, C) - m) * LOG2E)
        store_block(g_ptr + row * C, offs, coef * e * (_load_direction(u_row, offs, C) - mean), C)


def _exact(x: Tensor, constants: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Shares of the value (1, rows), and what the gradient needs. constants: direction, weight."""
    direction, weight = constants
    rows = x.shape[0]
    part = x.new_empty((1, rows), dtype=torch.float32)
    saved = x.new_empty((3, rows), dtype=torch.float32)
    wrap_triton(exact_kernel, rows, x, direction)(weight, saved, part, rows)
    return part, saved


def _exact_gradient(x: Tensor, constants: list[Tensor], saved: Tensor, upstream: Tensor) -> Tensor:
    """The gradient (rows, C)."""
    direction, weight = constants
    gradient = x.new_empty(x.shape)
    wrap_triton(exact_gradient_kernel, x.shape[0], x, direction)(
        weight, saved, upstream, gradient, x.shape[0]
    )
    return gradient


_value = differentiable(
    register("mpl_fast::exact", _exact), register("mpl_fast::exact_gradient", _exact_gradient)
)


def exact_feedback(logits: Tensor, direction: Tensor, weight: Scalar) -> Tensor:
    """`losses.exact_feedback`. 2 launches forward, 1 backward; 1 more if weight is a number.

    All is read twice, a gradient written once.
    """
    x, fixed = dense_rows(logits), dense_rows(direction.detach())
    return _value(x, [fixed, on_device(weight, logits)], ())[0]
