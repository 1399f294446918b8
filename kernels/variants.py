"""Every function of the fused losses in every variant, on a few rows: what compiles all kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast.kernels import fused
from mpl_fast.kernels.outputs import Pseudo

LABELED, UNLABELED = 3, 2  # counts are no part of a kernel


class Rows(NamedTuple):
    """What kind of rows: all that a kernel is compiled for."""

    classes: int
    width: int  # classes and padding
    dtype: torch.dtype

    def logits(self, count: int) -> Tensor:
        """(count, width) zeros that want a gradient."""
        return torch.zeros(count, self.width, dtype=self.dtype, requires_grad=True)


def _labels(count: int) -> Tensor:
    return torch.arange(count)


def _teacher(rows: Rows, pseudo: Pseudo) -> None:
    out = fused.teacher_loss(
        rows.logits(LABELED + 2 * UNLABELED),
        _labels(LABELED),
        UNLABELED,
        uda_weight=1.0,
        feedback=0.1,
        temperature=0.7,
        threshold=0.6,
        label_smoothing=0.1,
        pseudo=pseudo,
        truth=_labels(UNLABELED),
        num_classes=rows.classes,
    )
    out.loss.backward()


def _teacher_and_grad(rows: Rows, pseudo: Pseudo) -> None:
    fused.teacher_loss_and_grad(
        rows.logits(LABELED + 2 * UNLABELED),
        _labels(LABELED),
        UNLABELED,
        uda_weight=1.0,
        feedback=0.1,
        temperature=0.7,
        threshold=0.6,
        label_smoothing=0.1,
        pseudo=pseudo,
        truth=_labels(UNLABELED),
        num_classes=rows.classes,
    )


def _student(rows: Rows, pseudo: Tensor) -> None:
    out = fused.student_loss(
        rows.logits(LABELED + UNLABELED),
        pseudo,
        _labels(LABELED),
        label_smoothing=0.1,
        weight=torch.ones(UNLABELED),
        num_classes=rows.classes,
    )
    out.loss.backward()


def _student_and_grad(rows: Rows, pseudo: Tensor) -> None:
    fused.student_loss_and_grad(
        rows.logits(LABELED + UNLABELED),
        pseudo,
        _labels(LABELED),
        label_smoothing=0.1,
        weight=torch.ones(UNLABELED),
        num_classes=rows.classes,
    )


def _smoothed_ce(rows: Rows) -> None:
    out = fused.smoothed_ce(
        rows.logits(LABELED), _labels(LABELED), label_smoothing=0.1, num_classes=rows.classes
    )
    out.loss.backward()


def _pseudo_labels(rows: Rows, uniforms: Tensor | None) -> None:
    fused.pseudo_labels(
        rows.logits(UNLABELED).detach(),
        temperature=0.7,
        uniforms=uniforms,
        num_classes=rows.classes,
    )


def _cosine(rows: Rows, target: Tensor) -> None:
    out = fused.cosine_loss(
        rows.logits(UNLABELED), target, temperature=0.7, threshold=0.6, num_classes=rows.classes
    )
    out.loss.backward()


def _exact(rows: Rows) -> None:
    direction = torch.zeros(UNLABELED, rows.width)
    loss = fused.exact_feedback(
        rows.logits(UNLABELED), direction, weight=1.0, temperature=0.7, num_classes=rows.classes
    )
    loss.backward()


def _soft(rows: Rows) -> Tensor:
    return rows.logits(UNLABELED).detach()


VARIANTS: dict[str, Callable[[Rows], None]] = {
    "teacher_loss weak": lambda rows: _teacher(rows, "weak"),
    "teacher_loss strong": lambda rows: _teacher(rows, "strong"),
    "teacher_loss given": lambda rows: _teacher(rows, _labels(UNLABELED)),
    "teacher_loss_and_grad weak": lambda rows: _teacher_and_grad(rows, "weak"),
    "teacher_loss_and_grad strong": lambda rows: _teacher_and_grad(rows, "strong"),
    "teacher_loss_and_grad given": lambda rows: _teacher_and_grad(rows, _labels(UNLABELED)),
    "student_loss hard": lambda rows: _student(rows, _labels(UNLABELED)),
    "student_loss soft": lambda rows: _student(rows, _soft(rows)),
    "student_loss_and_grad hard": lambda rows: _student_and_grad(rows, _labels(UNLABELED)),
    "student_loss_and_grad soft": lambda rows: _student_and_grad(rows, _soft(rows)),
    "smoothed_ce": _smoothed_ce,
    "pseudo_labels arg-max": lambda rows: _pseudo_labels(rows, None),
    "pseudo_labels sampled": lambda rows: _pseudo_labels(rows, torch.zeros(UNLABELED)),
    "cosine_loss hard": lambda rows: _cosine(rows, _labels(UNLABELED)),
    "cosine_loss soft": lambda rows: _cosine(rows, _soft(rows)),
    "exact_feedback": _exact,
}
