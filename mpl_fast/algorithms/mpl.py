"""Meta Pseudo Labels (https://arxiv.org/abs/2003.10580)."""

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics, NewLearner
from mpl_fast.algorithms.uda import uda_metrics
from mpl_fast.batch import Batch
from mpl_fast.config import MPLConfig
from mpl_fast.distributed import mean_over_ranks
from mpl_fast.learner import Learner


class MetaPseudoLabels:
    """A teacher learns to label unlabeled images so that a student of those labels does well."""

    def __init__(self, config: MPLConfig, new_learner: NewLearner) -> None:
        self.config = config
        self.teacher, self.student = new_learner(config.teacher), new_learner(config.student)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.voters = [self.student]

    def step(self, batch: Batch, t: int) -> Metrics:
        teacher, student, consistency = self.teacher, self.student, self.config.consistency
        n_labeled, n_unlabeled = len(batch.labels), len(batch.weak)

        # The teacher labels the unlabeled images ...
        logits = teacher(batch.labeled, batch.weak, batch.strong)  # (L + 2U, C)
        first = n_labeled + (n_unlabeled if self.config.pseudo == "strong" else 0)
        pseudo = losses.pseudo_labels(logits[first : first + n_unlabeled].detach()).label  # (U,)

        # ... the student learns from nothing but those pseudo labels ...
        strong = student(batch.strong)  # (U, C)
        lesson = losses.student_loss(strong, pseudo, label_smoothing=self.config.smoothing)
        old = _labeled_loss(student, batch)
        student.descend(lesson.loss)

        # ... what that did for it on labeled images tells how good they were ...
        new = _labeled_loss(student, batch)
        h = mean_over_ranks(losses.mpl_feedback(old, new))
        heard = h if self.config.feedback == "difference" else torch.zeros_like(h)

        # ... and the teacher makes helpful ones likelier, while it learns by UDA itself.
        out = losses.teacher_loss(
            logits,
            batch.labels,
            n_unlabeled,
            uda_weight=consistency.weight_at(t),
            feedback=heard,
            temperature=consistency.temperature,
            threshold=consistency.threshold,
            label_smoothing=self.config.smoothing,
            pseudo=pseudo,
            truth=batch.truth,
        )
        teacher.descend(out.loss)
        student_metrics = {
            "loss/student": lesson.loss.detach(),
            "loss/student_labeled": new,
            "h": h,
        }
        return {**uda_metrics(out), "loss/feedback": out.mpl.detach(), **student_metrics}


def _labeled_loss(student: Learner, batch: Batch) -> Tensor:
    """The student's loss on labels, without gradient.

    Before and after its update it normalizes by the labeled batch alone, so that a student that
    does not move has a difference of exactly 0. (The published codes take `old` from the joint
    batch
    and `new` from the labeled one. Running statistics would be the same for both, but they fit the
    weights before the update and not those after it: h is then negative whatever was learned.)
    """
    return losses.smoothed_ce(student.judge(batch.labeled), batch.labels).loss
