"""The student's loss: smoothed, weighted cross-entropy with hard or soft pseudo labels.

One program takes one row. With d = s - max(s) of a row s, a the label smoothing, w the row's weight
and n the number of rows, its label adds

    loss = w / n (log Z - (1 - a) sum q d - a mean d)      Z = sum exp(d)
    dL/ds = u w / n (softmax(s) - (1 - a) q - a / C)

where q is 1[y] of a hard label y, or softmax(t) = e_t / Z_t of a teacher's logits t, and u is the
gradient with respect to the loss. One launch computes loss and gradient for u = 1 (GRAD), or the
loss alone. Then the backward pass launches a second kernel, which recomputes the gradient from the
logits and each row's maximum and Z: that is exact for every u, and 16-bit gradients are rounded
once, after it is multiplied in. Without GRAD and with hard labels the accuracy is computed, too.

Loss and accuracy are written as one partial sum for each program, already divided by n; their sum
is taken afterwards, which is deterministic, unlike atomics.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import dense_rows, differentiable, register, wrap_triton
from mpl_fast.kernels.outputs import CEOut
from mpl_fast.kernels.rows import (
    LOG2E,
    LOWEST,
    aligned,
    hard_row,
    inverse,
    load_block,
    rescaled,
    store_block,
    store_hard_gradient,
    valid_label,
)


@triton.jit
def _fold_soft(s, t, offs, start, sums, C: tl.constexpr):
    """Adds a block of both rows to maxima, Z, sum e_t d_s and sum d_s."""
    m_s, z_s, m_t, z_t, dot, sum_d = sums
    max_s = tl.maximum(m_s, tl.max(s, 0))
    max_t = tl.maximum(m_t, tl.max(t, 0))
    step_s = tl.where(z_s == 0.0, 0.0, m_s - max_s)
    step_t = tl.where(z_t == 0.0, 0.0, (m_t - max_t) * LOG2E)
    scale_t = tl.exp2(step_t)
    dot = rescaled(dot, step_s, z_t, scale_t)
    d_s = s - max_s
    e_t = tl.exp2((t - max_t) * LOG2E)
    z_s = z_s * tl.exp2(step_s * LOG2E) + tl.sum(tl.exp2(d_s * LOG2E), 0)
    z_t = z_t * scale_t + tl.sum(e_t, 0)
    dot += tl.sum(tl.where(e_t > 0, e_t * d_s, 0.0), 0)
    sum_d += step_s * start + tl.sum(tl.where(offs < C, d_s, 0.0), 0)
    return max_s, z_s, max_t, z_t, dot, sum_d


@triton.jit
def _soft_row(s_ptr, t_ptr, smoothing, C: tl.constexpr, BLOCK: tl.constexpr):
    """Cross-entropy of a row with softmax(t), the maximum and Z of both rows."""
    lowest = tl.full([], LOWEST, tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    sums = lowest, zero, lowest, zero, zero, zero
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        s = load_block(s_ptr, offs, C)
        t = load_block(t_ptr, offs, C)
        sums = _fold_soft(s, t, offs, i, sums, C)
    m_s, z_s, m_t, z_t, dot, sum_d = sums
    # All classes at -inf are NaN, as in PyTorch: of s by the logarithm, of t by 0 / 0.
    loss = tl.log(tl.where(z_s == 0.0, float("nan"), z_s)) - (1.0 - smoothing) * (dot / z_t)
    if smoothing > 0:  # 0 * -inf would be NaN
        loss -= smoothing * (1.0 / C) * sum_d
    return loss, m_s, z_s, m_t, z_t


@triton.jit
def _store_soft_gradient(
    s_ptr, t_ptr, g_ptr, m_s, z_s, m_t, z_t, coef, smoothing, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes coef * dCE/ds of a row: softmax(s) - (1 - a) softmax(t) - a / C, a = smoothing."""
    c_p = coef / z_s
    c_q = coef * (1.0 - smoothing) / z_t
    c_1 = coef * smoothing * (1.0 / C)
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        p = tl.exp2((load_block(s_ptr, offs, C) - m_s) * LOG2E) * c_p
        q = tl.exp2((load_block(t_ptr, offs, C) - m_t) * LOG2E) * c_q
        store_block(g_ptr, offs, p - q - c_1, C)


@triton.jit
def _share(rows, weight_ptr, WEIGHTED: tl.constexpr):
    """A row's factor in a weighted mean over rows."""
    share = inverse(rows)
    if WEIGHTED:
        share *= tl.load(weight_ptr).to(tl.float32)
    return share


# Neither counts nor the alignment of single numbers are compiled in: see `teacher_kernel`.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["label_ptr", "weight_ptr", "saved_ptr", "part_ptr"],
)
def student_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    soft_ptr,  # (rows, C) logits if SOFT
    soft_stride,
    label_ptr,  # (rows,) int64, unless SOFT
    weight_ptr,  # (rows,) if WEIGHTED
    part_ptr,  # (2, rows) float32, written: shares of the loss and, unless SOFT or GRAD, accuracy
    saved_ptr,  # (2 or 4 if SOFT, rows) float32, written unless GRAD
    g_ptr,  # (rows, C), written if GRAD
    rows,
    smoothing,
    C: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2**31 elements
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    g_row = g_ptr + row * C
    # tl.cast, since inductor passes floats as float64, and a count of 1 as a constant.
    rows = tl.cast(rows, tl.int64)
    smoothing = tl.cast(smoothing, tl.float32)
    if SOFT:
        t_row = soft_ptr + row * aligned(soft_stride, ALIGN)
        loss, m, z, m_t, z_t = _soft_row(x_row, t_row, smoothing, C, BLOCK)
        share = _share(rows, weight_ptr + row, WEIGHTED)  # only now: the loop needs the registers
        if GRAD:
            _store_soft_gradient(x_row, t_row, g_row, m, z, m_t, z_t, share, smoothing, C, BLOCK)
        else:
            tl.store(saved_ptr + 2 * rows + row, m_t)
            tl.store(saved_ptr + 3 * rows + row, z_t)
    else:
        label = tl.load(label_ptr + row)
        y, valid = valid_label(label, C)
        share = _share(rows, weight_ptr + row, WEIGHTED) * valid
        loss, m, z, top = hard_row(x_row, y, smoothing, C, not GRAD, BLOCK)
        if GRAD:
            store_hard_gradient(x_row, g_row, m, z, y, share, smoothing, C, BLOCK)
        else:
            tl.store(part_ptr + rows + row, tl.where(top == label, inverse(rows), 0.0))
    if not GRAD:
        tl.store(saved_ptr + row, m)
        tl.store(saved_ptr + rows + row, z)
    tl.store(part_ptr + row, loss * share)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["label_ptr", "weight_ptr", "saved_ptr", "upstream_ptr"],
)
def student_gradient_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    soft_ptr,  # (rows, C) logits if SOFT
    soft_stride,
    label_ptr,  # (rows,) int64, unless SOFT
    weight_ptr,  # (rows,) if WEIGHTED
    saved_ptr,  # (2 or 4 if SOFT, rows) float32, of `student_kernel`
    upstream_ptr,  # a number: the gradient with respect to the loss
    g_ptr,  # (rows, C), written
    rows,
    smoothing,
    C: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    g_row = g_ptr + row * C
    rows = tl.cast(rows, tl.int64)
    smoothing = tl.cast(smoothing, tl.float32)
    m = tl.load(saved_ptr + row)
    z = tl.load(saved_ptr + rows + row)
    coef = _share(rows, weight_ptr + row, WEIGHTED) * tl.load(upstream_ptr).to(tl.float32)
    if SOFT:
        t_row = soft_ptr + row * aligned(soft_stride, ALIGN)
        m_t = tl.load(saved_ptr + 2 * rows + row)
        z_t = tl.load(saved_ptr + 3 * rows + row)
        _store_soft_gradient(x_row, t_row, g_row, m, z, m_t, z_t, coef, smoothing, C, BLOCK)
    else:
        y, valid = valid_label(tl.load(label_ptr + row), C)
        store_hard_gradient(x_row, g_row, m, z, y, coef * valid, smoothing, C, BLOCK)


def _student(
    x: Tensor, constants: list[Tensor], label_smoothing: float, grad: bool
) -> tuple[Tensor, Tensor]:
    """Shares of loss and accuracy (1 or 2, rows), and the gradient or what it needs later.

    constants: pseudo labels and, if any, weights. Accuracy is of hard labels without `grad` alone.
    """
    (pseudo, *weight), (rows, _) = constants, x.shape
    soft = pseudo.dim() == 2
    part = x.new_empty((1 if soft or grad else 2, rows), dtype=torch.float32)
    if grad:
        result = x.new_empty(x.shape)
    else:
        result = x.new_empty((4 if soft else 2, rows), dtype=torch.float32)
    wrap_triton(student_kernel, rows, x, pseudo if soft else x)(
        pseudo,
        weight[0] if weight else x,
        part,
        x if grad else result,
        result if grad else x,
        rows,
        float(label_smoothing),
        SOFT=soft,
        WEIGHTED=bool(weight),
        GRAD=grad,
    )
    return part, result


def _student_gradient(
    x: Tensor,
    constants: list[Tensor],
    label_smoothing: float,
    grad: bool,
    saved: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The gradient (rows, C)."""
    pseudo, *weight = constants
    gradient = x.new_empty(x.shape)
    soft = pseudo.dim() == 2
    wrap_triton(student_gradient_kernel, x.shape[0], x, pseudo if soft else x)(
        pseudo,
        weight[0] if weight else x,
        saved,
        upstream,
        gradient,
        x.shape[0],
        float(label_smoothing),
        SOFT=soft,
        WEIGHTED=bool(weight),
    )
    return gradient


student = register("mpl_fast::student", _student)
_loss = differentiable(student, register("mpl_fast::student_gradient", _student_gradient))


def smoothed_ce(logits: Tensor, target: Tensor, label_smoothing: float) -> CEOut:
    """`losses.smoothed_ce`. 2 launches forward, 1 backward; logits read twice, written once."""
    return CEOut._make(_loss(dense_rows(logits), [target.contiguous()], (label_smoothing, False)))


def student_loss(
    logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor:
    """`losses.student_loss`. 2 launches forward, 1 backward; logits read twice, written once."""
    return _loss(dense_rows(logits), _constants(pseudo, weight), (label_smoothing, False))[0]


def student_loss_and_grad(
    logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`losses.student_loss_and_grad`. 2 launches; logits read once, a gradient written once."""
    x = dense_rows(logits.detach())
    part, gradient = student(x, _constants(pseudo, weight), label_smoothing, True)
    return part.sum(), gradient


def _constants(pseudo: Tensor, weight: Tensor | None) -> list[Tensor]:
    labels = dense_rows(pseudo.detach())
    return [labels] if weight is None else [labels, weight.detach().contiguous()]
