"""What is measured: four losses, the rows that they get, and the bytes that they must move."""

from typing import NamedTuple

import torch
from torch import Tensor

UNLABELED_PER_LABELED = 8
# Nothing is left out: sharpened, masked, smoothed, with feedback.
TEMPERATURE, THRESHOLD, SMOOTHING = 0.7, 0.6, 0.1
LOSSES = ("teacher", "student", "pseudo", "feedback")  # all that a step of MPL computes
WITHOUT_GRADIENT = ("pseudo", "feedback")


class Shape(NamedTuple):
    """A loss at one size."""

    loss: str  # one of LOSSES
    classes: int
    width: int  # columns: classes and padding
    batch: int  # unlabeled images
    dtype: torch.dtype

    @property
    def labeled(self) -> int:
        """Labeled images."""
        return self.batch // UNLABELED_PER_LABELED

    @property
    def rows(self) -> int:
        """labeled | weak | strong of the teacher, labeled | strong, weak; labeled, old and new."""
        if self.loss == "feedback":
            return 2 * self.labeled
        views = {"teacher": 2, "student": 1, "pseudo": 1}[self.loss] * self.batch
        return views if self.loss == "pseudo" else views + self.labeled

    @property
    def logit_bytes(self) -> int:
        """Size of the logits."""
        return self.rows * self.width * self.dtype.itemsize

    @property
    def minimal_bytes(self) -> int:
        """Each logit read once and, where there is one, its gradient written once."""
        return self.logit_bytes * (1 if self.loss in WITHOUT_GRADIENT else 2)

    def __str__(self) -> str:
        padded = f" in {self.width}" if self.width != self.classes else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.loss} C={self.classes}{padded} B={self.batch} {dtype}"


class Inputs(NamedTuple):
    """One set of arguments, all on one device."""

    logits: Tensor  # (rows, width), wants a gradient
    target: Tensor  # (L,) int64
    pseudo: Tensor  # (U,) int64, the student's labels
    truth: Tensor  # (U,) int64
    uda_weight: Tensor  # 0-dim float32
    feedback: Tensor  # 0-dim float32


class FeedbackOut(NamedTuple):
    """What a step learns of its student: two losses of labeled images, and their difference."""

    old: Tensor
    new: Tensor
    h: Tensor


def draw(shape: Shape, device: str, generator: torch.Generator | None = None) -> Inputs:
    """Random logits of a network that is sure of some rows; labels of any class."""

    def labels(count: int) -> Tensor:
        return torch.randint(shape.classes, (count,), device=device, generator=generator)

    logits = torch.randn(shape.rows, shape.width, device=device, generator=generator)
    logits[: shape.rows // 2] *= 4.0
    logits = logits.to(shape.dtype).requires_grad_()
    scalars = torch.rand(2, device=device, generator=generator) + 0.5
    return Inputs(
        logits,
        labels(shape.labeled),
        labels(shape.batch),
        labels(shape.batch),
        scalars[0].clone(),
        scalars[1].clone(),
    )
