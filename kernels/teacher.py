"""The teacher's loss in one launch: three terms, their statistics and the gradient.

One program takes one labeled row, or one (weak, strong) pair of rows, and reads each logit from
memory once where a row fits into registers, else twice. With d = x - max(x), T the temperature, n
the number of rows of a kind, and of a pair w and s:

    q = exp(d_w / T) / Z_w      conf = 1 / Z_w      mask = conf >= threshold
    uda = mask (log Z_s - sum q d_s) / n            mpl = (log Z_s - d_s[y]) / n
    dL/ds = (a_u + a_m) softmax(s) - a_u q - a_m 1[y]

    a_u = uda_weight mask / n                       a_m = feedback / n

Statistics are written as one column of partial sums for each program, already divided by n; their
sum is taken afterwards, which is deterministic, unlike atomics. Online softmax: arXiv 1805.02867.
"""

# Triton's language only looks like Python: arguments are pointers and blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpl_fast.kernels.launch import dense_rows, on_device, register, wrap_triton
from mpl_fast.kernels.outputs import TeacherInputs, TeacherOut
from mpl_fast.kernels.rows import (
    LOG2E,
    LOWEST,
    aligned,
    fold_max,
    hard_row,
    inverse,
    load_block,
    rescaled,
    store_block,
    store_hard_gradient,
    valid_label,
    zero_row,
)

STATISTICS = TeacherOut._fields[:-1]  # the rows of `part_ptr`


@triton.jit
def _fold(w, s, start, sums, inv_t, TOP_WEAK: tl.constexpr, TOP_STRONG: tl.constexpr):
    """Adds a block of both rows to maxima, Z, sum e_w d_w / T, sum e_w d_s, and an arg-max."""
    m_w, z_w, a_w, m_s, z_s, dot, top = sums
    max_w, top = fold_max(w, start, m_w, top, TOP_WEAK)
    max_s, top = fold_max(s, start, m_s, top, TOP_STRONG)
    step_w = tl.where(z_w == 0.0, 0.0, (m_w - max_w) * inv_t)
    step_s = tl.where(z_s == 0.0, 0.0, m_s - max_s)
    scale_w = tl.exp2(step_w * LOG2E)
    a_w = rescaled(a_w, step_w, z_w, scale_w)
    dot = rescaled(dot, step_s, z_w, scale_w)
    d_w = (w - max_w) * inv_t  # subtract first: w / T overflows where T is tiny
    d_s = s - max_s
    e_w = tl.exp2(d_w * LOG2E)
    z_w = z_w * scale_w + tl.sum(e_w, 0)
    z_s = z_s * tl.exp2(step_s * LOG2E) + tl.sum(tl.exp2(d_s * LOG2E), 0)
    a_w += tl.sum(tl.where(e_w > 0, e_w * d_w, 0.0), 0)
    dot += tl.sum(tl.where(e_w > 0, e_w * d_s, 0.0), 0)
    return max_w, z_w, a_w, max_s, z_s, dot, top


@triton.jit
def _sums(
    w_ptr,
    s_ptr,
    inv_t,
    C: tl.constexpr,
    TOP_WEAK: tl.constexpr,
    TOP_STRONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_fold` of all blocks of two rows; a Z of 0 becomes NaN: all classes at -inf."""
    lowest = tl.full([], LOWEST, tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    sums = lowest, zero, zero, lowest, zero, zero, tl.full([], 0, tl.int32)
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C)
        s = load_block(s_ptr, offs, C)
        sums = _fold(w, s, i, sums, inv_t, TOP_WEAK, TOP_STRONG)
    m_w, z_w, a_w, m_s, z_s, dot, top = sums
    z_w = tl.where(z_w == 0.0, float("nan"), z_w)
    z_s = tl.where(z_s == 0.0, float("nan"), z_s)
    return m_w, z_w, a_w, m_s, z_s, dot, top


@triton.jit
def _store_gradient(
    w_ptr, s_ptr, g_ptr, m_w, m_s, inv_t, y, c_p, c_q, c_y, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes c_p exp(d_s) - c_q exp(d_w / T) - c_y 1[y] of a strong row."""
    for i in range(0, C, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        w = load_block(w_ptr, offs, C)
        s = load_block(s_ptr, offs, C)
        g = tl.exp2((s - m_s) * LOG2E) * c_p - tl.exp2((w - m_w) * inv_t * LOG2E) * c_q
        store_block(g_ptr, offs, tl.where(offs == y, g - c_y, g), C)


@triton.jit
def _pair(
    w_ptr,
    s_ptr,
    g_ptr,
    given_ptr,
    truth_ptr,
    label_ptr,
    n,
    uda_weight_ptr,
    feedback_ptr,
    inv_t,
    threshold,
    C: tl.constexpr,
    TOP_WEAK: tl.constexpr,
    TOP_STRONG: tl.constexpr,
    HAS_TRUTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A weak and a strong row of one image: the label, the strong row's gradient, statistics.

    Returns the shares of uda, mpl, mask rate, confidence, entropy and labels equal to truth.
    """
    m_w, z_w, a_w, m_s, z_s, dot, top = _sums(w_ptr, s_ptr, inv_t, C, TOP_WEAK, TOP_STRONG, BLOCK)
    # A row of NaN has no arg-max: keep the index inside the row in every case.
    label = tl.minimum(top, C - 1).to(tl.int64)
    if not (TOP_WEAK or TOP_STRONG):
        label = tl.load(given_ptr)
    y, valid = valid_label(label, C)
    # Not before the loop over the rows, which needs the registers; nor are loads kept across one.
    inv_n = inverse(n)
    conf = tl.div_rn(1.0, z_w)  # rounded as PyTorch's division: it is compared
    mask = tl.where(conf >= threshold, 1.0, 0.0)
    a_u = tl.load(uda_weight_ptr) * mask * inv_n
    a_m = tl.load(feedback_ptr) * valid * inv_n
    _store_gradient(
        w_ptr, s_ptr, g_ptr, m_w, m_s, inv_t, y, (a_u + a_m) / z_s, a_u * conf, a_m, C, BLOCK
    )
    tl.store(label_ptr, label)
    log_z_s = tl.log(z_s)
    uda = (log_z_s - dot * conf) * mask * inv_n  # times and not where: NaN must propagate
    mpl = (log_z_s - (tl.load(s_ptr + y).to(tl.float32) - m_s)) * valid * inv_n
    entropy = (tl.log(z_w) - a_w * conf) * inv_n
    hit = 0.0
    if HAS_TRUTH:
        hit = tl.where(tl.load(truth_ptr) == label, inv_n, 0.0)
    return uda, mpl, mask * inv_n, conf * inv_n, entropy, hit


@triton.jit
def _store_column(part_ptr, pitch, shares):
    """One program's shares of STATISTICS."""
    for i in tl.static_range(len(shares)):
        tl.store(part_ptr + i * pitch, shares[i])


# Counts must not be compiled in: every last, smaller batch would be a new kernel. Nor the addresses
# of single numbers: 16-byte alignment widens accesses to rows alone, and a weight or labels that
# are a view into a larger tensor would be a new kernel, in the middle of a run or a capture.
@triton.jit(
    do_not_specialize=["n_l", "n_u"],
    do_not_specialize_on_alignment=[
        "target_ptr",
        "given_ptr",
        "truth_ptr",
        "label_ptr",
        "part_ptr",
        "uda_weight_ptr",
        "feedback_ptr",
    ],
)
def teacher_kernel(
    x_ptr,  # (n_l + 2 n_u, C) rows labeled | weak | strong
    x_stride,
    g_ptr,  # (n_l + 2 n_u, C), written
    target_ptr,  # (n_l,) int64
    given_ptr,  # (n_u,) int64, the labels if neither TOP_WEAK nor TOP_STRONG
    truth_ptr,  # (n_u,) int64 if HAS_TRUTH
    label_ptr,  # (n_u,) int64, written
    part_ptr,  # (len(STATISTICS), n_l + n_u) float32, written
    uda_weight_ptr,  # float32
    feedback_ptr,  # float32
    n_l,
    n_u,
    inv_t,
    threshold,
    smoothing,
    C: tl.constexpr,
    TOP_WEAK: tl.constexpr,
    TOP_STRONG: tl.constexpr,
    HAS_TRUTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: n_l + n_u programs, in the order of the rows."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 2**31 elements
    x_stride = aligned(x_stride, ALIGN)
    # tl.cast, since inductor passes floats as float64, and a count of 1 as a constant.
    n_l = tl.cast(n_l, tl.int64)
    n_u = tl.cast(n_u, tl.int64)
    inv_t = tl.cast(inv_t, tl.float32)
    threshold = tl.cast(threshold, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    pitch = n_l + n_u
    x_row = x_ptr + row * x_stride
    g_row = g_ptr + row * C
    part_ptr += row
    if row < n_l:
        y, valid = valid_label(tl.load(target_ptr + row), C)
        loss, m, z, _ = hard_row(x_row, y, smoothing, C, False, BLOCK)
        share = valid * inverse(n_l)
        store_hard_gradient(x_row, g_row, m, z, y, share, smoothing, C, BLOCK)
        loss *= share
        _store_column(part_ptr, pitch, (loss, loss, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    else:
        u = row - n_l
        uda, mpl, mask, confidence, entropy, hit = _pair(
            x_row,
            x_row + n_u * x_stride,
            g_row + n_u * C,
            given_ptr + u,
            truth_ptr + u,
            label_ptr + u,
            n_u,
            uda_weight_ptr,
            feedback_ptr,
            inv_t,
            threshold,
            C,
            TOP_WEAK,
            TOP_STRONG,
            HAS_TRUTH,
            BLOCK,
        )
        loss = tl.load(uda_weight_ptr) * uda + tl.load(feedback_ptr) * mpl
        _store_column(part_ptr, pitch, (loss, 0.0, uda, mpl, mask, confidence, entropy, hit))
        zero_row(g_row, C, BLOCK)


def _teacher(
    x: Tensor,
    target: Tensor,
    given: list[Tensor],
    truth: list[Tensor],
    n_unlabeled: int,
    uda_weight: Tensor,
    feedback: Tensor,
    from_strong: bool,
    temperature: float,
    threshold: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics (len(STATISTICS), L + U), labels (U,), gradient (L + 2U, C).

    given, truth: labels (U,), or none. uda_weight, feedback: 0-dim float32.
    """
    rows = x.shape[0]
    part = x.new_empty((len(STATISTICS), rows - n_unlabeled), dtype=torch.float32)
    label = x.new_empty(n_unlabeled, dtype=torch.int64)
    gradient = x.new_empty(x.shape)
    wrap_triton(teacher_kernel, rows - n_unlabeled, x)(
        gradient,
        target,
        given[0] if given else target,
        truth[0] if truth else target,
        label,
        part,
        uda_weight,
        feedback,
        rows - 2 * n_unlabeled,
        n_unlabeled,
        1.0 / temperature,
        float(threshold),
        float(label_smoothing),
        TOP_WEAK=not (given or from_strong),
        TOP_STRONG=from_strong and not given,
        HAS_TRUTH=bool(truth),
    )
    return part, label, gradient


teacher = register("mpl_fast::teacher", _teacher)


def teacher_loss_and_grad(inputs: TeacherInputs) -> tuple[TeacherOut, Tensor]:
    """`losses.teacher_loss_and_grad`. 2 launches; 1 more for each weight that is a number."""
    x, pseudo = dense_rows(inputs.logits.detach()), inputs.pseudo
    # Detached since the compiler takes no tensor twice, and a caller may pass the same labels for
    # two of these.
    part, label, gradient = teacher(
        x,
        inputs.target.detach().contiguous(),
        [pseudo.detach().contiguous()] if isinstance(pseudo, Tensor) else [],
        [] if inputs.truth is None else [inputs.truth.detach().contiguous()],
        inputs.n_unlabeled,
        on_device(inputs.uda_weight, x),
        on_device(inputs.feedback, x),
        isinstance(pseudo, str) and pseudo == "strong",
        inputs.temperature,
        inputs.threshold,
        inputs.label_smoothing,
    )
    return TeacherOut._make([*part.sum(1).unbind(), label]), gradient
