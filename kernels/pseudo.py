"""Pseudo labels in one launch: each row's label, confidence and entropy.

One program takes one row w and reads each logit from memory once where a row fits into registers;
else once, and a second time where labels are sampled. With d = w - max(w) and e = exp(d):

    confidence = 1 / Z      entropy = log Z - sum e d / Z      Z = sum e

and the label is the arg-max, or of a uniform number r the first class c with e_0 + ... + e_c > r Z.
Cumulative sums are taken in float32, and in a tree: a uniform number within their rounding of the
border between two classes may give either.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import dense_rows, register, wrap_triton
from mpl_fast.kernels.outputs import PseudoLabels
from mpl_fast.kernels.rows import LOG2E, LOWEST, aligned, fold_max, load_block, rescaled

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _fold(x, start, m, z, a, top):
    """Adds a block to maximum, Z, sum e log2(e) and the arg-max."""
    m_new, top = fold_max(x, start, m, top, True)
    step = tl.where(z == 0.0, 0.0, (m - m_new) * LOG2E)
    scale = tl.exp2(step)
    d = (x - m_new) * LOG2E
    e = tl.exp2(d)
    a = rescaled(a, step, z, scale) + tl.sum(tl.where(e > 0, e * d, 0.0), 0)
    return m_new, z * scale + tl.sum(e, 0), a, top


@triton.jit
def _sample(x, offs, m, below, height, label, last):
    """Finds in a block the first class whose cumulative sum, `below` before it, exceeds `height`.

    Impossible classes are passed over: sums taken in a tree may fall by a rounding from one class
    to the next. `last` is the last possible class so far, for when rounding leaves no sum above.
    """
    e = tl.exp2((x - m) * LOG2E)
    steps = below + tl.cumsum(e, 0)
    label = tl.minimum(label, tl.min(tl.where((steps > height) & (e > 0), offs, NOWHERE), 0))
    last = tl.maximum(last, tl.max(tl.where(e > 0, offs, 0), 0))
    return below + tl.sum(e, 0), label, last


# Single numbers are read at any address: see `teacher_kernel`.
@triton.jit(
    do_not_specialize_on_alignment=["uniform_ptr", "label_ptr", "confidence_ptr", "entropy_ptr"]
)
def pseudo_kernel(
    x_ptr,  # (rows, C)
    x_stride,
    uniform_ptr,  # (rows,) in [0, 1) if SAMPLED
    label_ptr,  # (rows,) int64, written
    confidence_ptr,  # (rows,) float32, written
    entropy_ptr,  # (rows,) float32, written
    C: tl.constexpr,
    SAMPLED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2**31 elements
    x_row = x_ptr + row * aligned(x_stride, ALIGN)
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    a = tl.full([], 0.0, tl.float32)
    label = tl.full([], 0, tl.int32)
    for i in range(0, C, BLOCK):
        x = load_block(x_row, i + tl.arange(0, BLOCK), C)
        m, z, a, label = _fold(x, i, m, z, a, label)
    z = tl.where(z == 0.0, float("nan"), z)  # all classes at -inf: NaN, as in PyTorch
    if SAMPLED:
        height = tl.load(uniform_ptr + row).to(tl.float32) * z
        label = tl.full([], NOWHERE, tl.int32)
        last = tl.full([], 0, tl.int32)
        below = tl.full([], 0.0, tl.float32)
        for i in range(0, C, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            x = load_block(x_row, offs, C)
            below, label, last = _sample(x, offs, m, below, height, label, last)
        label = tl.where(label == NOWHERE, last, label)
    confidence = tl.div_rn(1.0, z)  # rounded as PyTorch's division: it is compared
    # A row of NaN has no arg-max: keep the index inside the row in every case.
    tl.store(label_ptr + row, tl.minimum(label, C - 1).to(tl.int64))
    tl.store(confidence_ptr + row, confidence)
    tl.store(entropy_ptr + row, tl.log(z) - a * confidence / LOG2E)


def _pseudo(x: Tensor, uniforms: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, confidences and entropies, each (rows,). uniforms: (rows,), or none."""
    rows = x.shape[0]
    label = x.new_empty(rows, dtype=torch.int64)
    confidence, entropy = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    wrap_triton(pseudo_kernel, rows, x)(
        uniforms[0] if uniforms else x, label, confidence, entropy, SAMPLED=bool(uniforms)
    )
    return label, confidence, entropy


pseudo = register("mpl_fast::pseudo_labels", _pseudo)


def pseudo_labels(weak: Tensor, uniforms: Tensor | None) -> PseudoLabels:
    """`losses.pseudo_labels`. 1 launch; logits read once, wide rows twice to sample a label."""
    given = [] if uniforms is None else [uniforms.detach().contiguous()]
    return PseudoLabels(*pseudo(dense_rows(weak.detach()), given))
