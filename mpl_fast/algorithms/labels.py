"""Pseudo labels for the student: arg-max classes, drawn classes or soft labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.config.algorithms import LabelKind

INVALID = -2  # and not -1, which is the truth of an image without a label


class Labels(NamedTuple):
    """Pseudo labels of U images, constants: arguments of `losses.student_loss`."""

    target: Tensor  # (U,) int64 classes, or (U, C) logits whose softmax is the soft label
    weight: Tensor | None  # (U,) float32: 1 for images in the student's loss, else 0; None: all 1
    hard: Tensor  # (U,) int64: `target`, or its arg-max for soft labels

    def select(self, rows: slice) -> "Labels":
        """The labels of some rows."""
        weight = None if self.weight is None else self.weight[rows]
        return Labels(self.target[rows], weight, self.hard[rows])


def make_labels(
    logits: Tensor, kind: LabelKind, *, uniforms: Tensor | None = None, threshold: float = 0.0
) -> Labels:
    """Pseudo labels from a teacher's logits ``(U, C)``.

    `uniforms`: ``(U,)`` in [0, 1), for kind sampled. `threshold`: images whose largest probability
    is smaller get weight 0; a threshold of 0 gives no weights. Rows of logits that are not finite
    get class INVALID, which makes the losses NaN, so that `Learner` skips the update.
    """
    found = losses.pseudo_labels(logits, uniforms=uniforms)
    hard = torch.where(found.confidence.isfinite(), found.label, INVALID)
    weight = (found.confidence >= threshold).to(torch.float32) if threshold > 0 else None
    return Labels(logits if kind == "soft" else hard, weight, hard)
