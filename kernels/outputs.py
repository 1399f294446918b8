"""What each loss returns: the same tuples from every implementation.

Loss terms carry gradients; in float32, or float64 for float64 logits. The rest is for logs:
detached 0-dim float32 tensors that stay on the logits' device, so that reading none of them costs
no synchronization.
"""

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

Scalar: TypeAlias = float | Tensor
"""A number, or a 0-dim tensor on the logits' device; it is taken as a constant."""

Pseudo: TypeAlias = Literal["weak", "strong"] | Tensor
"""Whose arg-max is the pseudo label, or the labels themselves: (U,) int64."""


class PseudoLabels(NamedTuple):
    """A teacher's opinion of each row."""

    label: Tensor  # (U,) int64
    confidence: Tensor  # (U,) float32, the largest sharpened probability
    entropy: Tensor  # (U,) float32, in nats, of the sharpened probabilities


class CEOut(NamedTuple):
    """Cross-entropy of labeled rows."""

    loss: Tensor
    accuracy: Tensor  # share of the rows whose arg-max is the target


class StudentOut(NamedTuple):
    """The student's loss on pseudo labels, and how it does on labeled rows."""

    loss: Tensor
    labeled_ce: Tensor  # without smoothing and gradient: the `old` of the feedback
    labeled_accuracy: Tensor


class TeacherOut(NamedTuple):
    """The teacher's loss, its three unweighted terms, and what became of the unlabeled rows."""

    loss: Tensor  # sup + uda_weight * uda + feedback * mpl
    sup: Tensor  # this and the next two carry gradients of their own
    uda: Tensor
    mpl: Tensor
    mask_rate: Tensor  # share of the unlabeled rows whose confidence reaches the threshold
    confidence: Tensor  # mean over the unlabeled rows
    entropy: Tensor  # mean over the unlabeled rows, in nats
    pseudo_accuracy: Tensor  # share of the labels below that equal truth; 0 without truth
    label: Tensor  # (U,) int64, the pseudo labels that mpl used


class CosineOut(NamedTuple):
    """One minus the cosine between two distributions."""

    loss: Tensor
    mask_rate: Tensor  # share of the rows whose target's largest probability reaches the threshold
