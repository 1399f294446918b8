"""How a teacher hears what its labels did for the student (derivations: docs/algorithms.md)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics
from mpl_fast.algorithms.labels import Labels
from mpl_fast.config.algorithms import Derivative
from mpl_fast.distributed import mean_over_ranks
from mpl_fast.learner import Learner
from mpl_fast.learner.jvp import log_softmax_jvp
from mpl_fast.learner.rng import replay_rng, rng_state

ALL = slice(None)


class Feedback(Protocol):
    """Listens to one step of a student: made before it, asked after it."""

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        """The student of these logits ``(U, C)`` has just moved `rate` along their gradient (NaN:
        its step was left out)."""

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        """A term of the teacher's loss; `view` is ``(U, C)``, its logits with gradient, or some
        `rows` of them, as are the `labels`."""

    def metrics(self) -> Metrics:
        """`h`, by how much the labels are held to have lowered the labeled loss, and others."""


class NoFeedback:
    """No feedback; the labeled loss is told all the same."""

    def __init__(self, student: Learner, images: Tensor, labels: Tensor) -> None:
        self._student, self._images, self._labels = student, images, labels

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self.new = labeled_loss(self._student, self._images, self._labels)

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        return view.new_zeros(())

    def metrics(self) -> Metrics:
        return {"h": torch.zeros_like(self.new), "loss/student_labeled": self.new}


class Difference:
    """h = labeled loss before minus after the student's step, a number for the whole batch.

    The first-order derivative of Meta Pseudo Labels (arXiv 2003.10580), without bias if the labels
    were drawn from the teacher. `baseline` (0-dim) is the moving average that is subtracted.
    """

    def __init__(
        self,
        student: Learner,
        images: Tensor,
        labels: Tensor,
        baseline: Tensor | None = None,
        momentum: float = 0.99,
    ) -> None:
        self._student, self._images, self._labels = student, images, labels
        self._baseline, self._momentum = baseline, momentum
        self._old = labeled_loss(student, images, labels)

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self.new = labeled_loss(self._student, self._images, self._labels)
        # Of a step that was left out nothing is known: the teacher's is left out with it.
        after = torch.where(rate.isfinite(), self.new, torch.nan)
        old, new = mean_over_ranks(torch.stack([self._old, after]))
        self.h = losses.mpl_feedback(old, new, self._baseline, momentum=self._momentum)

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        return self.h * losses.student_loss(view, labels.target, weight=labels.weight).loss

    def metrics(self) -> Metrics:
        return {"h": self.h, "loss/student_labeled": self.new}


def labeled_loss(student: Learner, images: Tensor, labels: Tensor) -> Tensor:
    """The student's cross-entropy on labels, without gradient.

    Before and after its update it normalizes by the labeled batch alone, so that a student that
    does not move has a difference of exactly 0. (The published codes take the first from the joint
    batch and the second from the labeled one. Running statistics would be the same for both, but
    they fit the weights before the update and not those after it: h is then negative whatever was
    learned.)
    """
    return losses.smoothed_ce(student.forward_batch_stats(images), labels).loss


class _Directional:
    """u = d log softmax(student) along the gradient of the labeled loss after the student's step.

    The cross-entropy of a student is linear in the label, so that the labeled loss after a plain
    step of rate r changes by r/U * sum u * (change of the labels): without second derivatives.
    `unlabeled` is what the student's passes of this step see, in their order.
    """

    def __init__(
        self,
        student: Learner,
        images: Tensor,
        labels: Tensor,
        unlabeled: Sequence[Tensor],
        label_smoothing: float,
        derivative: Derivative,
    ) -> None:
        self._student, self._images, self._labels = student, images, labels
        self._unlabeled, self._smoothing, self._derivative = unlabeled, label_smoothing, derivative
        self._before = student.weights()
        self._dropouts = rng_state(student.device)  # of the student's passes, which come next
        self.heard: list[Tensor] = []  # h of the rows of each term

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        student = self._student
        direction, self.new = student.labeled_gradient(self._images, self._labels)
        with replay_rng(self._dropouts, student.device):
            change = [
                student.jvp(self._before, direction, images, self._derivative)
                for images in self._unlabeled
            ]
        self.u = log_softmax_jvp(strong, torch.cat(change))
        if labels.weight is not None:
            self.u = self.u * labels.weight[:, None]
        self.rate = rate * (1.0 - self._smoothing)
        self._before = []

    def metrics(self) -> Metrics:
        return {"h": torch.stack(self.heard).mean(), "loss/student_labeled": self.new}


class Exact(_Directional):
    """The whole derivative for soft labels: rate/U * sum u * softmax(teacher), without noise."""

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        value = losses.exact_feedback(view, self.u[rows], weight=self.rate)
        self.heard.append(-value.detach())
        return value


class PerExample(_Directional):
    """For each drawn label its own h = -rate/U * u[label]; without bias, and less noise."""

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        h = -self.rate * self.u[rows].gather(-1, labels.target[:, None])[:, 0]
        self.heard.append(h.mean())
        return losses.student_loss(view, labels.target, weight=h).loss
