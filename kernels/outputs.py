"""Inputs and outputs of the kernels: the same tuples for every implementation.

Loss terms are float32, or float64 for float64 logits. Everything else in an output is a statistic:
a detached 0-dim float32 tensor on the logits' device, so that no call synchronizes.
"""

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

Scalar: TypeAlias = float | Tensor
"""A number, or a 0-dim tensor on the logits' device; it is taken as a constant."""

Pseudo: TypeAlias = Literal["weak", "strong"] | Tensor
"""The view whose arg-max is the pseudo label, or the labels themselves: (U,) int64."""


class TeacherInputs(NamedTuple):
    """Arguments of `losses.teacher_loss_and_grad`, which documents them."""

    logits: Tensor  # (L + 2U, C), rows labeled | weak | strong
    target: Tensor  # (L,) int64
    n_unlabeled: int  # U
    uda_weight: Scalar
    feedback: Scalar
    temperature: float
    threshold: float
    label_smoothing: float
    pseudo: Pseudo
    truth: Tensor | None  # (U,) int64


class TeacherOut(NamedTuple):
    """The teacher's loss, its three unweighted terms, and statistics of the unlabeled rows."""

    loss: Tensor  # sup + uda_weight * uda + feedback * mpl
    sup: Tensor
    uda: Tensor
    mpl: Tensor
    mask_rate: Tensor  # share of the unlabeled rows whose confidence reaches the threshold
    confidence: Tensor  # mean over the unlabeled rows
    entropy: Tensor  # mean over the unlabeled rows, in nats
    pseudo_accuracy: Tensor  # share of the labels below that equal truth; 0 without truth
    label: Tensor  # (U,) int64, the pseudo labels of the term mpl


class CEOut(NamedTuple):
    """Cross-entropy with classes."""

    loss: Tensor
    accuracy: Tensor  # share of the rows whose arg-max is the target


class CosineOut(NamedTuple):
    """One minus the cosine between two distributions."""

    loss: Tensor
    mask_rate: Tensor  # share of the rows whose target's largest probability reaches the threshold


class PseudoLabels(NamedTuple):
    """Per-row pseudo label, confidence and entropy."""

    label: Tensor  # (U,) int64
    confidence: Tensor  # (U,) float32, the largest probability
    entropy: Tensor  # (U,) float32, in nats


class Dual(NamedTuple):
    """A tensor and its derivative along a direction, of the same shape."""

    primal: Tensor
    tangent: Tensor
