"""Feedback terms of the teacher's loss: the effect of the student's update on its labeled loss.

The derivations are in docs/algorithms.md.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics
from mpl_fast.algorithms.labels import Labels
from mpl_fast.batch import Batch
from mpl_fast.config import MPLConfig, SMPLConfig
from mpl_fast.config.algorithms import BY_SGD_STEP
from mpl_fast.distributed import mean_over_ranks
from mpl_fast.learner import Learner
from mpl_fast.learner.jvp import log_softmax_jvp
from mpl_fast.learner.rng import replay_rng, rng_state

ALL = slice(None)


class Feedback(Protocol):
    """The feedback of one step: made before the student's update, complete after it.

    The feedback term of the teacher's loss is `term`, plus `ce_weight` times the cross-entropy of
    the strong views with the labels, which the fused loss computes in the same pass (`uda_loss`).
    """

    @property
    def ce_weight(self) -> Tensor | float:
        """0-dim, a constant; 0.0 if `term` is the whole feedback term."""

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        """Called after the student's update on `labels`.

        strong: ``(U, C)``, the student's logits before the update. rate: 0-dim, how far the weights
        moved along the negative gradient of these labels' loss; NaN if the update was skipped.
        """

    def term(self, logits: Tensor, rows: slice = ALL) -> Tensor:
        """A 0-dim loss of the teacher's logits ``(rows, C)``, which carry gradient.

        The logits are of the view that the labels are credited to, or of some `rows` of it.
        """

    def metrics(self) -> Metrics:
        """`feedback`: by how much the labels lowered the labeled loss; `loss/student_labeled`."""


class NoFeedback:
    """No feedback; only the student's labeled loss is measured."""

    ce_weight = 0.0

    def __init__(self, student: Learner, measured: Batch) -> None:
        self._student, self._measured = student, measured

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self._new = labeled_loss(self._student, self._measured)

    def term(self, logits: Tensor, rows: slice = ALL) -> Tensor:
        return logits.new_zeros(())

    def metrics(self) -> Metrics:
        return {"feedback": torch.zeros_like(self._new), "loss/student_labeled": self._new}


class DifferenceFeedback:
    """h = labeled loss before minus after the student's update, one number for the whole batch.

    The first-order derivative of Meta Pseudo Labels (arXiv 2003.10580); unbiased if the labels were
    drawn from the teacher. `baseline` (0-dim) is a moving average of h that is subtracted from it.
    `fused`: leave the cross-entropy of the term to `uda_loss`, which must then be of all images.
    """

    def __init__(
        self,
        student: Learner,
        measured: Batch,
        baseline: Tensor | None,
        momentum: float,
        *,
        fused: bool,
    ) -> None:
        self._student, self._measured = student, measured
        self._baseline, self._momentum, self._fused = baseline, momentum, fused
        self._old = labeled_loss(student, measured)

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self._pseudo = labels
        self._new = labeled_loss(self._student, self._measured)
        # A skipped update has no feedback: NaN makes the teacher skip its update too.
        after = torch.where(rate.isfinite(), self._new, torch.nan)
        old, new = mean_over_ranks(torch.stack([self._old, after]))
        self._h = losses.mpl_feedback(old, new, self._baseline, momentum=self._momentum)

    @property
    def ce_weight(self) -> Tensor | float:
        return self._h if self._fused else 0.0

    def term(self, logits: Tensor, rows: slice = ALL) -> Tensor:
        if self._fused:
            return logits.new_zeros(())
        labels = self._pseudo.select(rows)
        return self._h * losses.student_loss(logits, labels.target, weight=labels.weight)

    def metrics(self) -> Metrics:
        return {"feedback": self._h, "loss/student_labeled": self._new}


class DerivativeFeedback:
    """The derivative of the labeled loss after the student's update by the labels of that update.

    A student's cross-entropy is linear in the label, so a plain step of rate r changes the labeled
    loss by r/U * sum u * (change of the labels), where u is the derivative of log softmax(student)
    along the gradient of the labeled loss after the step. No second derivatives are needed.

    Feedback exact, for soft labels: r/U * sum u * softmax(teacher), without noise. per_example,
    for drawn labels: each label has its own h = -r/U * u[label]; unbiased, with less noise than the
    difference. `unlabeled`: the images of the student's passes in this step, in their order.
    """

    ce_weight = 0.0

    def __init__(
        self,
        config: MPLConfig | SMPLConfig,
        student: Learner,
        measured: Batch,
        unlabeled: Sequence[Tensor],
    ) -> None:
        self._config, self._student = config, student
        self._measured, self._unlabeled = measured, unlabeled
        self._weights = student.weights()
        self._rng = rng_state(student.device)  # which the student's passes draw their dropout from
        self._decreases: list[Tensor] = []  # one for each call of `term`

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        student = self._student
        measured = self._measured
        direction, self._new = student.labeled_gradient(measured.labeled, measured.labels)
        with replay_rng(self._rng, student.device):
            change = [
                student.jvp(self._weights, direction, images, self._config.derivative)
                for images in self._unlabeled
            ]
        self._weights = []
        self._pseudo = labels
        self._u = log_softmax_jvp(strong, torch.cat(change))  # (U, C)
        if labels.weight is not None:
            self._u = self._u * labels.weight[:, None]
        self._rate = rate * (1.0 - self._config.label_smoothing)

    def term(self, logits: Tensor, rows: slice = ALL) -> Tensor:
        if self._config.feedback == "exact":
            value = losses.exact_feedback(logits, self._u[rows], weight=self._rate)
            self._decreases.append(-value.detach())
            return value
        target = self._pseudo.target[rows]
        taken = target.clamp_min(0)[:, None]  # of an invalid label, the loss below is NaN
        h = -self._rate * self._u[rows].gather(-1, taken)[:, 0]
        self._decreases.append(h.mean())
        return losses.student_loss(logits, target, weight=h)

    def metrics(self) -> Metrics:
        decrease = torch.stack(self._decreases).mean()
        return {"feedback": decrease, "loss/student_labeled": self._new}


def make_feedback(
    config: MPLConfig | SMPLConfig,
    student: Learner,
    measured: Batch,
    unlabeled: Sequence[Tensor],
    baseline: Tensor | None = None,
    momentum: float = 0.0,
    *,
    fused: bool,
) -> Feedback:
    """The configured feedback by the labeled images of `measured`; none if the student's learning
    rate is 0. The other arguments are those of the classes above."""
    if config.feedback == "off" or student.lr == 0.0:
        return NoFeedback(student, measured)
    if config.feedback in BY_SGD_STEP:
        return DerivativeFeedback(config, student, measured, unlabeled)
    return DifferenceFeedback(student, measured, baseline, momentum, fused=fused)


def labeled_loss(student: Learner, measured: Batch) -> Tensor:
    """The student's cross-entropy on the labeled images of a batch, 0-dim, without gradient.

    Before and after the update batch norm uses the statistics of these images alone, so a student
    that does not move has a difference of exactly 0. (The published codes take the first loss from
    the joint batch and the second from the labeled one. Running statistics would be the same for
    both, but they fit the weights before the update and not those after it, which makes h negative
    for any labels.)
    """
    return losses.smoothed_ce(student.forward_batch_stats(measured.labeled), measured.labels).loss
