"""The labels that a teacher gives a student: the likeliest class, a drawn one, or all of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast import losses


class Labels(NamedTuple):
    """Constants; what `losses.student_loss` takes."""

    target: Tensor  # (U,) int64 classes, or (U, C) logits whose softmax is the label
    weight: Tensor | None  # (U,) float: 1 for an image that the student learns from, else 0
    hard: Tensor  # (U,) int64, the class, or the likeliest one

    def of(self, rows: slice) -> "Labels":
        """Those of some images."""
        weight = None if self.weight is None else self.weight[rows]
        return Labels(self.target[rows], weight, self.hard[rows])


def label(
    logits: Tensor, kind: str, *, uniforms: Tensor | None = None, threshold: float = 0.0
) -> Labels:
    """Labels of rows of a teacher's logits ``(U, C)``.

    `kind`: argmax, sampled (by `uniforms` ``(U,)`` in [0, 1)) or soft. `threshold`: rows whose
    largest probability is smaller get weight 0; at 0 there are no weights. A row of logits that are
    not finite gets a class that does not exist, which makes NaN of all that would be learned from
    it, so that the step is left out.
    """
    found = losses.pseudo_labels(logits, uniforms=uniforms if kind == "sampled" else None)
    found = found._replace(label=torch.where(found.confidence.isfinite(), found.label, -1))
    weight = (found.confidence >= threshold).to(torch.float32) if threshold > 0 else None
    return Labels(logits if kind == "soft" else found.label, weight, found.label)
