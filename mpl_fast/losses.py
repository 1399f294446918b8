"""The losses of all algorithms, and the one place that decides who computes them.

On a GPU with Triton installed they are fused kernels, everywhere else plain PyTorch
(`kernels/reference.py`, which defines them). Both modules satisfy `Backend`, so mypy fails where
their signatures drift apart. The environment variable ``MPL_FAST_LOSSES=reference`` keeps plain
PyTorch on a GPU too: for comparison, or on a machine without the C compiler that Triton needs.

What holds for all of them:

- Logits are (rows, W), float16, bfloat16, float32 or, in plain PyTorch, float64. Sums are float32
  (float64 of float64). Columns from `num_classes` on are padding: not looked at, gradient 0.
- All tensors lie on one device, and no function synchronizes it. Statistics are detached 0-dim
  float32 tensors there. A `Scalar` is a number or a 0-dim tensor there, and always a constant: as
  a tensor it may change under a captured CUDA graph, and it spares the launch that fills a number.
- They raise ValueError for a shape, device or number and TypeError for a type that cannot be right;
  the fused ones RuntimeError for a second derivative.
- *Values* of tensors are not checked, since that would synchronize. A label out of range turns the
  loss, and its row of the gradient, into NaN; a NaN in the logits survives the threshold.
- Means are over all rows of a kind, also over masked and ignored ones; over none they are 0.
- Bytes are those of the fused kernels, in units of the logits', and launches are theirs: both by
  design, not measured on a GPU. The 3 launches of a plain form are kernel and sum forward, and a
  kernel backward. Besides these PyTorch launches one for the 1 that ``loss.backward()`` starts
  from, the kernels' backend one for each `Scalar` that is a number or no float32, and one for a 0
  where the teacher's terms are differentiated, unless it is `loss` alone or all four.
- Rows of more than 8192 columns do not stay in registers: one pass that also writes a gradient, or
  draws a label, reads them a second time. Plain PyTorch, counted operation by operation by
  `tools/bench_kernels.py --smoke` (bfloat16, 1000 classes, 256 images): teacher 117 launches and
  71x, student 60 and 36x.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from mpl_fast.kernels import checks, reference
from mpl_fast.kernels.backend import Backend
from mpl_fast.kernels.outputs import (
    CEOut,
    CosineOut,
    Pseudo,
    PseudoLabels,
    Scalar,
    StudentOut,
    TeacherOut,
)

__all__ = [
    "Backend",
    "CEOut",
    "CosineOut",
    "PseudoLabels",
    "StudentOut",
    "TeacherOut",
    "backend",
    "cosine_loss",
    "exact_feedback",
    "mpl_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "student_loss_and_grad",
    "teacher_loss",
    "teacher_loss_and_grad",
    "use",
]

Choice = Literal["auto", "triton", "reference"]
VARIABLE = "MPL_FAST_LOSSES"


def _choice_of_environment() -> Choice:
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Choice):
        raise ConfigError(f"{VARIABLE} is {value!r}; it may be {', '.join(get_args(Choice))}")
    return cast(Choice, value)


_choice: Choice = _choice_of_environment()
_has_triton = find_spec("triton") is not None


def backend(logits: Tensor) -> Backend:
    """The implementation that serves these logits.

    "triton" serves CPU logits as well: Triton's interpreter (TRITON_INTERPRET=1) runs them, and
    without it a kernel can still be compiled for a GPU that is not here. float64 is for plain
    PyTorch alone: the kernels would quietly add up in float32.
    """
    known = logits.dtype != torch.float64
    if _choice == "triton" and not known:
        raise TypeError("the fused losses know no float64; use losses.use('reference')")
    if _choice == "triton" or (_choice == "auto" and known and logits.is_cuda and _has_triton):
        from mpl_fast.kernels import fused  # needs triton: import late

        return fused
    return reference


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Forces a backend, for tests and benchmarks."""
    global _choice
    previous, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = previous


def pseudo_labels(
    weak: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    num_classes: int | None = None,
) -> PseudoLabels:
    """Each row's class, max p and entropy (nats) under p = softmax(weak / temperature); a constant.

    weak: (U, W) logits. uniforms: (U,) floating, in [0, 1): draws the class from p, as the first
    one whose cumulated p exceeds the number; torch.rand fills it under a CUDA graph too. Without
    it the class is the arg-max, of equals the first. Values of `uniforms` are not checked: 1 and
    more give the last class that is possible.

    Reads 1.0x, 1 launch. Confidence and sharpening as in UDA, arXiv 1904.12848; sampled labels as
    in the derivation of Meta Pseudo Labels, arXiv 2003.10580.
    """
    classes = checks.logits(weak, num_classes)
    checks.temperature(temperature)
    if uniforms is not None:
        checks.floats("uniforms", uniforms, (weak.shape[0],), weak)
    return backend(weak).pseudo_labels(
        weak, temperature=temperature, uniforms=uniforms, num_classes=classes
    )


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """Mean over N rows of CE((1 - a) 1[target] + a / C, softmax(logits)), a = label_smoothing.

    logits: (N, W). target: (N,) int64. label_smoothing: in [0, 1). A row whose target is
    `ignore_index` adds 0 to the sum and counts in N, so that the denominator is no tensor.
    Returns the loss and, as a statistic, the share of rows whose arg-max is the target.

    3.0x in 3 launches: kernel and sum, backward. Label smoothing: arXiv 1512.00567.
    """
    classes = checks.logits(logits, num_classes)
    checks.labels("target", target, logits.shape[0], logits)
    checks.smoothing(label_smoothing)
    return backend(logits).smoothed_ce(
        logits,
        target,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        num_classes=classes,
    )


def student_loss(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
) -> StudentOut:
    """The student's loss on pseudo labels, and how it does on labeled rows before its update.

        loss = 1/U sum_i weight_i ((1 - a) CE(q_i, strong_i) + a CE(uniform, strong_i))

    logits: (L + U, W), rows labeled | strong. pseudo: (U,) int64, then q_i is one-hot; or (U, W)
    floating, the teacher's logits, then q = softmax(pseudo / temperature), a constant, as in the
    official code. target: (L,) int64, or None for L = 0. label_smoothing: a, in [0, 1).
    temperature: of soft labels alone. weight: (U,) floating, a constant; None is 1.
    Returns loss; labeled_ce, the mean CE of the labeled rows without smoothing and gradient, which
    is the `old` of `mpl_feedback` (a target of -100 is left out, as in `smoothed_ce`);
    labeled_accuracy. Labeled rows get gradient 0.

    3.0x in 3 launches; soft labels are read twice besides. Meta Pseudo Labels, arXiv 2003.10580.
    """
    classes = checks.student(
        logits, pseudo, target, label_smoothing, temperature, weight, num_classes
    )
    return backend(logits).student_loss(
        logits,
        pseudo,
        target,
        label_smoothing=label_smoothing,
        temperature=temperature,
        weight=weight,
        num_classes=classes,
    )


def student_loss_and_grad(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
    grad_scale: Tensor | None = None,
) -> tuple[StudentOut, Tensor]:
    """`student_loss` and, from the same pass, its gradient: go on with ``logits.backward(grad)``.

    grad_scale: None for 1, or 0-dim floating: multiplies the gradient before it is rounded to the
    logits' type (see docs/losses.md for GradScaler). Returns the tuple of `student_loss`, detached,
    and grad_scale * d loss / d logits, of the logits' shape and type.

    2.0x in 2 launches; soft labels are read once besides.
    """
    classes = checks.student(
        logits, pseudo, target, label_smoothing, temperature, weight, num_classes
    )
    checks.grad_scale(grad_scale, logits)
    return backend(logits).student_loss_and_grad(
        logits,
        pseudo,
        target,
        label_smoothing=label_smoothing,
        temperature=temperature,
        weight=weight,
        num_classes=classes,
        grad_scale=grad_scale,
    )


def teacher_loss(
    logits: Tensor,
    target: Tensor,
    n_unlabeled: int,
    *,
    uda_weight: Scalar,
    feedback: Scalar,
    temperature: float = 1.0,
    threshold: float = 0.0,
    label_smoothing: float = 0.0,
    pseudo: Pseudo = "weak",
    truth: Tensor | None = None,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> TeacherOut:
    """loss = sup + uda_weight * uda + feedback * mpl. With q = softmax(weak / temperature):

        sup = 1/L sum CE((1 - a) 1[target] + a / C, labeled)      a = label_smoothing
        uda = 1/U sum 1[max q >= threshold] CE(q, strong)         q is a constant
        mpl = 1/U sum CE(1[y], strong)

    logits: (L + 2U, W), rows labeled | weak | strong; weak rows get gradient 0. target: (L,) int64;
    `ignore_index` as in `smoothed_ce`. n_unlabeled: U, may be 0, as may L. uda_weight, feedback:
    scalars; feedback is the h of `mpl_feedback`, of either sign. threshold: >= 0, above 1 nothing
    passes. pseudo: whose arg-max y is, "weak" or "strong", or y itself, (U,) int64. truth: (U,)
    int64, for the statistic pseudo_accuracy alone; a value out of range only counts as a miss.
    Returns `TeacherOut`: of it loss, sup, uda and mpl may each be differentiated, also together.

    3.0x in 3 launches: kernel and sum, backward. UDA: arXiv 1904.12848. Meta Pseudo Labels:
    arXiv 2003.10580. Label smoothing: arXiv 1512.00567. Online softmax: arXiv 1805.02867.
    """
    classes = checks.teacher(
        logits,
        target,
        n_unlabeled,
        uda_weight,
        feedback,
        temperature,
        threshold,
        label_smoothing,
        pseudo,
        truth,
        num_classes,
    )
    return backend(logits).teacher_loss(
        logits,
        target,
        n_unlabeled,
        uda_weight=uda_weight,
        feedback=feedback,
        temperature=temperature,
        threshold=threshold,
        label_smoothing=label_smoothing,
        pseudo=pseudo,
        truth=truth,
        ignore_index=ignore_index,
        num_classes=classes,
    )


def teacher_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    n_unlabeled: int,
    *,
    uda_weight: Scalar,
    feedback: Scalar,
    temperature: float = 1.0,
    threshold: float = 0.0,
    label_smoothing: float = 0.0,
    pseudo: Pseudo = "weak",
    truth: Tensor | None = None,
    ignore_index: int = -100,
    num_classes: int | None = None,
    grad_scale: Tensor | None = None,
) -> tuple[TeacherOut, Tensor]:
    """`teacher_loss` and, from the same pass, its gradient: go on with ``logits.backward(grad)``.

    grad_scale: None for 1, or 0-dim floating: multiplies the gradient before it is rounded to the
    logits' type (see docs/losses.md for GradScaler). Returns the tuple of `teacher_loss`, detached,
    and grad_scale * d loss / d logits, of the logits' shape and type.

    2.0x in 2 launches: kernel and sum.
    """
    classes = checks.teacher(
        logits,
        target,
        n_unlabeled,
        uda_weight,
        feedback,
        temperature,
        threshold,
        label_smoothing,
        pseudo,
        truth,
        num_classes,
    )
    checks.grad_scale(grad_scale, logits)
    return backend(logits).teacher_loss_and_grad(
        logits,
        target,
        n_unlabeled,
        uda_weight=uda_weight,
        feedback=feedback,
        temperature=temperature,
        threshold=threshold,
        label_smoothing=label_smoothing,
        pseudo=pseudo,
        truth=truth,
        ignore_index=ignore_index,
        num_classes=classes,
        grad_scale=grad_scale,
    )


def cosine_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    threshold: float = 0.0,
    num_classes: int | None = None,
) -> CosineOut:
    """1/B sum 1[max q >= threshold] (1 - cos(softmax(logits), q)): in [0, 1], where CE has no end.

    logits: (B, W). target: (B,) int64, then q is one-hot; or (B, W) floating logits, then
    q = softmax(target / temperature), a constant. threshold: >= 0.
    Returns the loss and, as a statistic, the share of rows that passed the threshold.

    3.0x in 3 launches; soft targets are read twice besides. A consistency loss in TransferMPL's
    code, where it has no gradient, since both of its sides are detached there.
    """
    classes = checks.logits(logits, num_classes)
    checks.labels_or_logits("target", target, logits.shape[0], logits)
    checks.temperature(temperature)
    checks.threshold(threshold)
    return backend(logits).cosine_loss(
        logits, target, temperature=temperature, threshold=threshold, num_classes=classes
    )


def exact_feedback(
    logits: Tensor,
    direction: Tensor,
    *,
    weight: Scalar,
    temperature: float = 1.0,
    num_classes: int | None = None,
) -> Tensor:
    """weight/B sum_i sum_c direction_ic q_ic, q = softmax(logits / temperature): 0-dim.

        d/dlogits_c = weight / (B temperature) q_c (direction_c - sum_k q_k direction_k)

    The whole meta-gradient of one plain SGD step, without second derivatives, because the student's
    cross-entropy is linear in soft labels q. logits: (B, W), the teacher's. direction: (B, W)
    floating, a constant: the derivative of the student's log-softmax of these images along the
    gradient of its labeled loss after the step. weight: scalar, the student's learning rate; what
    weighs single rows (a mask, 1 - label smoothing) multiplies rows of `direction`: that is exact.

    3.0x in 3 launches; `direction` is read twice besides. Equation 3 of the derivation that starts
    from Meta Pseudo Labels, arXiv 2003.10580.
    """
    classes = checks.logits(logits, num_classes)
    checks.floats("direction", direction, (logits.shape[0], logits.shape[1]), logits)
    checks.scalar("weight", weight, logits)
    checks.temperature(temperature)
    return backend(logits).exact_feedback(
        logits, direction, weight=weight, temperature=temperature, num_classes=classes
    )


def mpl_feedback(
    old: Tensor, new: Tensor, average: Tensor | None = None, *, momentum: float = 0.99
) -> Tensor:
    """How much the student's labeled loss fell, h = old - new, less its running mean if given.

    old, new: 0-dim floating tensors on one device. average: 0-dim float32 there; it moves in place
    by (1 - momentum) of the way to old - new and is then subtracted, in the official code's order,
    so that the part of h that every step has, whatever the labels, is not credited to them.
    momentum: in [0, 1]. The sign is the paper's, not the official code's: h > 0 means that the
    pseudo labels helped (docs/algorithms.md).
    Returns h, 0-dim float32 without gradient. If old - new is NaN or infinite, so is h, and with it
    the teacher's loss; `average` does not move then, so that the next step's h is sound again.
    Plain PyTorch on every device: of float32 1 launch, 6 with `average`.

    Meta Pseudo Labels, arXiv 2003.10580.
    """
    checks.feedback(old, new, average, momentum)
    return reference.mpl_feedback(old, new, average, momentum=momentum)
