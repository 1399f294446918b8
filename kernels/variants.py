"""Every function of the fused losses in every variant, on a few rows: compiles all kernels."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast.kernels import fused
from mpl_fast.kernels.outputs import Dual, Pseudo, TeacherInputs

LABELED, UNLABELED = 3, 2  # counts are not compiled in


class Rows(NamedTuple):
    """What a kernel is compiled for."""

    classes: int
    dtype: torch.dtype

    def logits(self, count: int = UNLABELED) -> Tensor:
        """(count, classes) zeros that require a gradient."""
        return torch.zeros(count, self.classes, dtype=self.dtype, requires_grad=True)


def _teacher(rows: Rows, pseudo: Pseudo) -> None:
    logits, target = rows.logits(LABELED + 2 * UNLABELED), torch.arange(LABELED)
    truth = torch.arange(UNLABELED)
    fused.teacher_loss_and_grad(
        TeacherInputs(logits, target, UNLABELED, 1.0, 0.1, 0.7, 0.6, 0.1, pseudo, truth)
    )


def _student(rows: Rows, soft: bool, grad: bool) -> None:
    pseudo = rows.logits().detach() if soft else torch.arange(UNLABELED)
    arguments = rows.logits(), pseudo, 0.1, torch.ones(UNLABELED)
    if grad:
        fused.student_loss_and_grad(*arguments)
    else:
        fused.student_loss(*arguments).backward()


def _smoothed_ce(rows: Rows) -> None:
    fused.smoothed_ce(rows.logits(LABELED), torch.arange(LABELED), 0.1).loss.backward()


def _pseudo_labels(rows: Rows, uniforms: Tensor | None) -> None:
    fused.pseudo_labels(rows.logits(), uniforms)


def _cosine(rows: Rows) -> None:
    fused.cosine_loss(rows.logits(), rows.logits(), 0.7, 0.6).loss.backward()


def _exact(rows: Rows) -> None:
    fused.exact_feedback(rows.logits(), rows.logits().float(), 1.0).backward()


def _batch_norm_jvp(rows: Rows, given: bool) -> None:
    x, channel = rows.logits().detach(), torch.zeros(rows.classes)
    weight, statistics = Dual(channel, channel), (channel, channel) if given else None
    fused.batch_norm_jvp(Dual(x, x), weight, weight, statistics, 1e-5, 0.0)


VARIANTS: dict[str, Callable[[Rows], None]] = {
    "teacher_loss_and_grad weak": partial(_teacher, pseudo="weak"),
    "teacher_loss_and_grad strong": partial(_teacher, pseudo="strong"),
    "teacher_loss_and_grad given": partial(_teacher, pseudo=torch.arange(UNLABELED)),
    "student_loss hard": partial(_student, soft=False, grad=False),
    "student_loss soft": partial(_student, soft=True, grad=False),
    "student_loss_and_grad hard": partial(_student, soft=False, grad=True),
    "student_loss_and_grad soft": partial(_student, soft=True, grad=True),
    "smoothed_ce": _smoothed_ce,
    "pseudo_labels arg-max": partial(_pseudo_labels, uniforms=None),
    "pseudo_labels sampled": partial(_pseudo_labels, uniforms=torch.zeros(UNLABELED)),
    "cosine_loss": _cosine,
    "exact_feedback": _exact,
    "batch_norm_jvp batch": partial(_batch_norm_jvp, given=False),
    "batch_norm_jvp given": partial(_batch_norm_jvp, given=True),
}
