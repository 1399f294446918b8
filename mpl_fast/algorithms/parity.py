"""Meta Pseudo Labels as two public codes compute it, mistakes included: for comparison only."""

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.uda import uda_loss, uda_metrics
from mpl_fast.batch import Batch
from mpl_fast.distributed import mean_over_ranks


class Kekmodel(MetaPseudoLabels):
    """The step of kekmodel/MPL-pytorch (main.py, 7dc6297).

    The student learns the arg-max of the weak view; the teacher is told of the arg-max of its
    strong view, by new - old; old comes from a batch that the student shares with strong views, new
    from the labeled images alone, whose pass moves the running statistics a second time; nothing
    is averaged over ranks. A `feedback_weight` of -1 gives old - new.
    """

    taught: Tensor  # (U,) int64, what the last step taught the student

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        n = len(batch.weak)
        logits = teacher(batch.labeled, batch.weak, batch.strong)
        labels = losses.pseudo_labels(logits[-2 * n : -n].detach()).label
        self.taught = labels

        both = student(batch.labeled, batch.strong)
        old = losses.smoothed_ce(both[:-n].detach(), batch.labels).loss
        lesson = losses.student_loss(both[-n:], labels, label_smoothing=config.label_smoothing)
        student.backward_and_step(lesson.loss)
        student.end_step(t)  # the average is taken before the next pass moves the statistics again

        with torch.no_grad():
            new = losses.smoothed_ce(student(batch.labeled), batch.labels).loss
        h = config.feedback_weight_at(t) * (new - old)
        terms, out = uda_loss(
            logits,
            batch,
            t,
            config.consistency,
            config.label_smoothing,
            feedback=h,
            pseudo="strong",
        )
        teacher.backward_and_step(*terms)
        return {
            **uda_metrics(out),
            "loss/student": lesson.loss.detach(),
            "h": h,
            "loss/student_old": old,
            "loss/student_labeled": new,
            "loss/feedback": h * out.mpl.detach(),
            "loss/teacher": out.loss,
        }


class Google(MetaPseudoLabels):
    """The step of google-research/meta_pseudo_labels (class MPL of training_utils.py).

    The student learns soft labels of the strong view, in one batch with the labeled images; h is
    new - old less its moving average (decay `baseline`, here from 0 where that code begins at a
    random number). Its term is the cross-entropy of the strong logits with their own softmax: the
    gradient is softmax - softmax = 0, so the feedback does nothing whatever h is.
    """

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        n = len(batch.weak)
        logits = teacher(batch.labeled, batch.weak, batch.strong)
        soft = logits[-n:].detach()

        both = student(batch.strong, batch.labeled)
        old = losses.smoothed_ce(both[n:].detach(), batch.labels).loss
        lesson = losses.student_loss(both[:n], soft, label_smoothing=config.label_smoothing)
        student.backward_and_step(lesson.loss)

        new = losses.smoothed_ce(student.forward_no_grad(batch.labeled), batch.labels).loss
        old, new = mean_over_ranks(torch.stack([old, new]))
        h = losses.mpl_feedback(
            new, old, self.state.get("baseline"), momentum=config.baseline or 0.99
        )
        before = t - 1  # the ramp of that code begins at 0
        terms, out = uda_loss(logits, batch, before, config.consistency, config.label_smoothing)
        feedback = losses.student_loss(logits[-n:], soft).loss
        teacher.backward_and_step(*terms, config.feedback_weight_at(t) * h * feedback)
        return {
            **uda_metrics(out),
            "loss/student": lesson.loss.detach(),
            "h": h,
            "loss/student_labeled": new,
            "loss/feedback": h * feedback.detach(),
        }
