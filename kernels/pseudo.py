"""A teacher's opinion of each row in one launch: label, confidence and entropy.

One program takes one row w and reads each logit from memory once where a row fits into registers
(SINGLE); else once, and a second time where labels are drawn. With d = w - max(w), T the
temperature and e = exp(d / T):

    confidence = 1 / Z      entropy = log Z - sum e (d / T) / Z      Z = sum e

and the label is the arg-max, or of a uniform number r the first class c with e_0 + ... + e_c > r Z.
"""

import triton
import triton.language as tl

from mpl_fast.kernels.pairs import rescaled
from mpl_fast.kernels.rows import LOG2E, LOWEST, load_block

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _fold(x, start, m, z, a, top, rate):
    """Takes a block into maximum, Z, sum e log2(e) and the arg-max."""
    block_max, at = tl.max(x, 0, return_indices=True)
    top = tl.where(block_max > m, start + at, top)  # > and not >=: of equals, the first
    m_new = tl.maximum(m, block_max)
    step = tl.where(z == 0.0, 0.0, (m - m_new) * rate)
    scale = tl.exp2(step)
    d = (x - m_new) * rate  # subtract first: x / T overflows where T is tiny
    e = tl.exp2(d)
    a = rescaled(a, step, z, scale) + tl.sum(tl.where(e > 0, e * d, 0.0), 0)
    return m_new, z * scale + tl.sum(e, 0), a, top


@triton.jit
def _draw(x, offs, m, rate, below, height, label, last):
    """Looks in a block for the first class whose cumulative sum, `below` before it, tops `height`.

    Impossible classes are passed over: sums taken in a tree may fall by a rounding from one class
    to the next. `last` is the last possible class so far, for when rounding leaves no sum above.
    """
    e = tl.exp2((x - m) * rate)
    steps = below + tl.cumsum(e, 0)
    label = tl.minimum(label, tl.min(tl.where((steps > height) & (e > 0), offs, NOWHERE), 0))
    last = tl.maximum(last, tl.max(tl.where(e > 0, offs, 0), 0))
    return below + tl.sum(e, 0), label, last


# Single numbers are read wherever they lie: see `teacher_kernel`.
@triton.jit(
    do_not_specialize_on_alignment=["uniform_ptr", "label_ptr", "confidence_ptr", "entropy_ptr"]
)
def pseudo_kernel(
    x_ptr,  # (rows, W)
    x_stride,
    uniform_ptr,  # (rows,) in [0, 1) if DRAWN
    label_ptr,  # (rows,) int64, written
    confidence_ptr,  # (rows,) float32, written
    entropy_ptr,  # (rows,) float32, written
    inv_t,
    C: tl.constexpr,
    W: tl.constexpr,
    DRAWN: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program for each row."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 logits
    # Tells the compiler that rows are aligned: see `student_kernel`.
    x_row = x_ptr + row * ((x_stride // ALIGN) * ALIGN)
    # tl.cast: inductor hands floats over as float64.
    inv_t = tl.cast(inv_t, tl.float32)
    rate = inv_t * LOG2E  # of exponents to the base of 2: one product less for each logit
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    a = tl.full([], 0.0, tl.float32)
    label = tl.full([], 0, tl.int32)
    if SINGLE:
        offs = tl.arange(0, BLOCK)
        x = load_block(x_row, offs, C, W)
        m, z, a, label = _fold(x, 0, m, z, a, label, rate)
    else:
        for i in range(0, W, BLOCK):
            x = load_block(x_row, i + tl.arange(0, BLOCK), C, W)
            m, z, a, label = _fold(x, i, m, z, a, label, rate)
    z = tl.where(z == 0.0, float("nan"), z)  # all classes at -inf: NaN, as in PyTorch
    if DRAWN:
        height = tl.load(uniform_ptr + row).to(tl.float32) * z
        label = tl.full([], NOWHERE, tl.int32)
        last = tl.full([], 0, tl.int32)
        below = tl.full([], 0.0, tl.float32)
        if SINGLE:
            below, label, last = _draw(x, offs, m, rate, below, height, label, last)
        else:
            for i in range(0, W, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                x = load_block(x_row, offs, C, W)
                below, label, last = _draw(x, offs, m, rate, below, height, label, last)
        label = tl.where(label == NOWHERE, last, label)
    confidence = tl.div_rn(1.0, z)  # rounded as PyTorch's division: it is compared
    # A row of NaN has no arg-max: keep the index inside the row whatever came out.
    tl.store(label_ptr + row, tl.minimum(label, C - 1).to(tl.int64))
    tl.store(confidence_ptr + row, confidence)
    tl.store(entropy_ptr + row, tl.log(z) - a * confidence / LOG2E)
