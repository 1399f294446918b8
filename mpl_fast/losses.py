"""The losses of all algorithms, and the choice of their implementation.

On a GPU with Triton installed they are fused kernels, everywhere else plain PyTorch
(`kernels/reference.py`, which defines them). Both modules satisfy `Backend`, so mypy fails where
their signatures drift apart. The environment variable ``MPL_FAST_LOSSES=reference`` selects plain
PyTorch on a GPU too: for comparison, or on a machine without the C compiler that Triton needs.

All of them:

- Logits are (rows, C), float16, bfloat16, float32 or, in plain PyTorch, float64. Sums are float32
  (float64 of float64).
- All tensors are on one device, and no function synchronizes it. Statistics are detached 0-dim
  float32 tensors there. A `Scalar` is a number or a 0-dim tensor there, and always a constant: as
  a tensor it may change under a captured CUDA graph, and saves the launch that fills a number.
- They raise ValueError for a shape, device or number and TypeError for a type that cannot be right;
  the fused ones RuntimeError for a second derivative.
- *Values* of tensors are not checked, since that would synchronize. A label out of range turns the
  loss, and its row of the gradient, into NaN; a NaN in the logits is not hidden by the threshold.
- Means are over all rows of a kind, also over masked ones; over none they are 0.
- Bytes are those of the fused kernels, in units of the logits', and launches are theirs: both by
  design, not measured on a GPU. The 3 launches of a differentiable loss are kernel and sum forward,
  and a kernel backward. Besides these PyTorch launches one for the 1 that ``loss.backward()``
  starts from, and one for each `Scalar` that is a number or no float32.
- Rows of more than 8192 columns do not stay in registers: one pass that also writes a gradient, or
  samples a label, reads them a second time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from mpl_fast.kernels import checks, reference
from mpl_fast.kernels.outputs import (
    CEOut,
    CosineOut,
    Dual,
    Pseudo,
    PseudoLabels,
    Scalar,
    TeacherInputs,
    TeacherOut,
)

__all__ = [
    "Backend",
    "CEOut",
    "CosineOut",
    "PseudoLabels",
    "TeacherOut",
    "backend",
    "cosine_loss",
    "exact_feedback",
    "mpl_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "student_loss_and_grad",
    "teacher_loss_and_grad",
    "use",
]

Choice = Literal["auto", "triton", "reference"]
VARIABLE = "MPL_FAST_LOSSES"


class Backend(Protocol):
    """An implementation of the losses, called with checked arguments: `fused` or `reference`.

    `batch_norm_jvp` is no loss: the learner's derivatives call it.
    """

    def pseudo_labels(self, weak: Tensor, uniforms: Tensor | None) -> PseudoLabels: ...

    def smoothed_ce(self, logits: Tensor, target: Tensor, label_smoothing: float) -> CEOut: ...

    def student_loss(
        self, logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
    ) -> Tensor: ...

    def student_loss_and_grad(
        self, logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def teacher_loss_and_grad(self, inputs: TeacherInputs) -> tuple[TeacherOut, Tensor]: ...

    def cosine_loss(
        self, logits: Tensor, target: Tensor, temperature: float, threshold: float
    ) -> CosineOut: ...

    def exact_feedback(self, logits: Tensor, direction: Tensor, weight: Scalar) -> Tensor: ...

    def batch_norm_jvp(
        self,
        x: Dual,
        weight: Dual,
        bias: Dual,
        given: tuple[Tensor, Tensor] | None,
        eps: float,
        slope: float,
    ) -> Dual: ...


def _choice_of_environment() -> Choice:
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Choice):
        raise ConfigError(f"{VARIABLE} is {value!r}; it may be {', '.join(get_args(Choice))}")
    return cast(Choice, value)


_choice: Choice = _choice_of_environment()
_has_triton = find_spec("triton") is not None


def backend(logits: Tensor) -> Backend:
    """The implementation for these logits.

    "triton" includes CPU logits: Triton's interpreter (TRITON_INTERPRET=1) runs them, and without
    it a kernel can still be compiled for a GPU that is not here. float64 is for plain PyTorch
    alone: the kernels would silently add up in float32.
    """
    supported = logits.dtype != torch.float64
    if _choice == "triton" and not supported:
        raise TypeError("the fused losses do not support float64; use losses.use('reference')")
    if _choice == "triton" or (_choice == "auto" and supported and logits.is_cuda and _has_triton):
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


def pseudo_labels(weak: Tensor, *, uniforms: Tensor | None = None) -> PseudoLabels:
    """Per-row pseudo label, confidence max p and entropy (nats) of p = softmax(weak), constants.

    weak: (U, C) logits. uniforms: (U,) floating point, in [0, 1): samples the class from p, as the
    first one whose cumulated p exceeds the number; torch.rand fills it under a CUDA graph too.
    Without it the class is the arg-max, of equals the first. Values of `uniforms` are not checked:
    1 and more give the last class that is possible.

    Reads 1.0x, 1 launch. Confidence as in UDA, arXiv 1904.12848; sampled labels as in the
    derivation of Meta Pseudo Labels, arXiv 2003.10580.
    """
    checks.logits(weak)
    if uniforms is not None:
        checks.floats("uniforms", uniforms, (weak.shape[0],), weak)
    return backend(weak).pseudo_labels(weak, uniforms)


def smoothed_ce(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> CEOut:
    """Mean over N rows of CE((1 - a) 1[target] + a / C, softmax(logits)), a = label_smoothing.

    logits: (N, C). target: (N,) int64. label_smoothing: in [0, 1).
    Returns the loss and, as a statistic, the share of rows whose arg-max is the target.

    3.0x in 3 launches. Label smoothing: arXiv 1512.00567.
    """
    checks.logits(logits)
    checks.labels("target", target, logits.shape[0], logits)
    checks.smoothing(label_smoothing)
    return backend(logits).smoothed_ce(logits, target, label_smoothing)


def student_loss(
    logits: Tensor, pseudo: Tensor, *, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """The student's loss on pseudo labels, 0-dim, with a = label_smoothing:

        1/U sum_i weight_i ((1 - a) CE(q_i, logits_i) + a CE(uniform, logits_i))

    logits: (U, C). pseudo: (U,) int64, then q_i is one-hot; or (U, C) floating point, the teacher's
    logits, then q = softmax(pseudo), a constant, as in the official code. label_smoothing: in
    [0, 1). weight: (U,) floating point, a constant; None is 1.

    3.0x in 3 launches; soft labels are read twice besides. Meta Pseudo Labels, arXiv 2003.10580.
    """
    checks.student(logits, pseudo, label_smoothing, weight)
    return backend(logits).student_loss(logits, pseudo, label_smoothing, weight)


def student_loss_and_grad(
    logits: Tensor, pseudo: Tensor, *, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`student_loss` and, from the same pass, its gradient: go on with ``logits.backward(grad)``.

    Returns the loss, detached, and d loss / d logits, of the logits' shape and type.

    2.0x in 2 launches; soft labels are read once besides.
    """
    checks.student(logits, pseudo, label_smoothing, weight)
    return backend(logits).student_loss_and_grad(logits, pseudo, label_smoothing, weight)


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
) -> tuple[TeacherOut, Tensor]:
    """loss = sup + uda_weight * uda + feedback * mpl, and from the same pass its gradient.

    With q = softmax(weak / temperature), a constant, and a = label_smoothing:

        sup = 1/L sum CE((1 - a) 1[target] + a / C, labeled)
        uda = 1/U sum 1[max q >= threshold] CE(q, strong)
        mpl = 1/U sum CE(1[y], strong)

    logits: (L + 2U, C), rows labeled | weak | strong; weak rows get gradient 0. target: (L,) int64.
    n_unlabeled: U, may be 0, as may L. uda_weight, feedback: scalars; feedback is the h of
    `mpl_feedback`, of either sign. threshold: >= 0, above 1 nothing passes. pseudo: the view whose
    arg-max y is, "weak" or "strong", or y itself, (U,) int64. truth: (U,) int64, for the statistic
    pseudo_accuracy alone; a value out of range only counts as a miss.
    Returns `TeacherOut`, detached, and d loss / d logits, of the logits' shape and type: go on with
    ``logits.backward(grad)``.

    2.0x in 2 launches: kernel and sum. UDA: arXiv 1904.12848. Meta Pseudo Labels: arXiv 2003.10580.
    Label smoothing: arXiv 1512.00567. Online softmax: arXiv 1805.02867.
    """
    inputs = TeacherInputs(
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
    )
    checks.teacher(inputs)
    return backend(logits).teacher_loss_and_grad(inputs)


def cosine_loss(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, threshold: float = 0.0
) -> CosineOut:
    """1/B sum 1[max q >= threshold] (1 - cos(softmax(logits), q)), in [0, 1]; CE is unbounded.

    logits: (B, C). target: (B, C) logits; q = softmax(target / temperature), a constant.
    threshold: >= 0.
    Returns the loss and, as a statistic, the share of rows that passed the threshold.

    3.0x in 3 launches; targets are read twice besides. A consistency loss in TransferMPL's code,
    where it has no gradient, since both of its sides are detached there.
    """
    checks.logits(logits)
    checks.floats("target", target, tuple(logits.shape), logits)
    checks.temperature(temperature)
    checks.threshold(threshold)
    return backend(logits).cosine_loss(logits, target, temperature, threshold)


def exact_feedback(logits: Tensor, direction: Tensor, *, weight: Scalar) -> Tensor:
    """weight/B sum_i sum_c direction_ic q_ic, q = softmax(logits): 0-dim.

        d/dlogits_c = weight / B q_c (direction_c - sum_k q_k direction_k)

    The whole meta-gradient of one plain SGD step, without second derivatives, because the student's
    cross-entropy is linear in soft labels q. logits: (B, C), the teacher's. direction: (B, C)
    floating point, a constant: the derivative of the student's log-softmax of these images along
    the gradient of its labeled loss after the step. weight: scalar, the student's learning rate;
    weights of single rows (a mask, 1 - label smoothing) multiply rows of `direction`: that is
    exact.

    3.0x in 3 launches; `direction` is read twice besides. Equation 3 of the derivation that starts
    from Meta Pseudo Labels, arXiv 2003.10580.
    """
    checks.logits(logits)
    checks.floats("direction", direction, tuple(logits.shape), logits)
    checks.scalar("weight", weight, logits)
    return backend(logits).exact_feedback(logits, direction, weight)


def mpl_feedback(
    old: Tensor, new: Tensor, average: Tensor | None = None, *, momentum: float = 0.99
) -> Tensor:
    """Decrease of the student's labeled loss, h = old - new, less its running mean if given.

    old, new: 0-dim floating point tensors on one device. average: 0-dim float32 there; it is
    updated in place by (1 - momentum) of the way to old - new and then subtracted, in the official
    code's order, so that the part of h that every step has, whatever the labels, is not credited
    to them. momentum: in [0, 1]. The sign is the paper's, not the official code's: h > 0 means that
    the pseudo labels helped (docs/algorithms.md).
    Returns h, 0-dim float32 without gradient. If old - new is NaN or infinite, so is h, and with it
    the teacher's loss; `average` is not updated then, so that the next step's h is valid again.
    Plain PyTorch on every device: of float32 1 launch, 6 with `average`.

    Meta Pseudo Labels, arXiv 2003.10580.
    """
    checks.feedback(old, new, average, momentum)
    return reference.mpl_feedback(old, new, average, momentum=momentum)
