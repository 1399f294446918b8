"""The steps of two public implementations of Meta Pseudo Labels, mistakes included.

For comparison only: as options of the step in mpl.py these mistakes would obscure it.
"""

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.uda import uda_loss
from mpl_fast.algorithms.views import name_views
from mpl_fast.batch import Batch
from mpl_fast.distributed import mean_over_ranks


class Kekmodel(MetaPseudoLabels):
    """The step of kekmodel/MPL-pytorch (main.py, 7dc6297).

    The student learns the arg-max of the weak view, but the teacher's feedback term has the arg-max
    of the strong view, and h = new - old. The old loss comes from a batch of labeled and strong
    images, the new one from the labeled images alone, in a pass that updates the running statistics
    a second time. Nothing is averaged over ranks. A `feedback_weight` of -1 gives old - new.
    """

    student_labels: Tensor  # (U,) int64, of the last step

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        logits = name_views(teacher(batch.labeled, batch.weak, batch.strong), batch)
        self.student_labels = losses.pseudo_labels(logits.weak.detach()).label

        student_logits = student(batch.labeled, batch.strong)
        labeled, strong = student_logits.split([len(batch.labeled), len(batch.strong)])
        old = losses.smoothed_ce(labeled.detach(), batch.labels).loss
        student_loss = losses.student_loss(
            strong, self.student_labels, label_smoothing=config.label_smoothing
        )
        student.backward_and_step(student_loss)
        student.end_step(t)  # the average is updated before the next pass moves the statistics

        with torch.no_grad():
            new = losses.smoothed_ce(student(batch.labeled), batch.labels).loss
        h = config.feedback_weight_at(t) * (new - old)
        loss = uda_loss(logits, batch, t, config, feedback=h, pseudo="strong")
        teacher.backward_and_step(*loss.terms)
        return {
            **loss.metrics,
            "loss/student": student_loss.detach(),
            "feedback": h,
            "loss/student_old": old,
            "loss/student_labeled": new,
            "loss/feedback": h * loss.out.mpl,
            "loss/teacher": loss.out.loss,
        }


class Google(MetaPseudoLabels):
    """The step of google-research/meta_pseudo_labels (class MPL of training_utils.py).

    The student learns soft labels of the strong view, in one batch with the labeled images; h is
    new - old less its moving average (decay `baseline`, here from 0, there from a random number).
    The feedback term is h times the cross-entropy of the strong logits with their own softmax,
    whose gradient is softmax - softmax = 0: the feedback has no effect whatever h is.
    """

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        logits = name_views(teacher(batch.labeled, batch.weak, batch.strong), batch)
        soft = logits.strong.detach()

        student_logits = student(batch.strong, batch.labeled)
        strong, labeled = student_logits.split([len(batch.strong), len(batch.labeled)])
        old = losses.smoothed_ce(labeled.detach(), batch.labels).loss
        student_loss = losses.student_loss(strong, soft, label_smoothing=config.label_smoothing)
        student.backward_and_step(student_loss)

        new = losses.smoothed_ce(student.forward_no_grad(batch.labeled), batch.labels).loss
        old, new = mean_over_ranks(torch.stack([old, new]))
        h = losses.mpl_feedback(
            new, old, self.state.get("baseline"), momentum=config.baseline or 0.99
        )
        ramp_step = t - 1  # the ramp of that code begins at 0
        loss = uda_loss(logits, batch, ramp_step, config)
        feedback = losses.student_loss(logits.strong, soft)
        teacher.backward_and_step(*loss.terms, config.feedback_weight_at(t) * h * feedback)
        return {
            **loss.metrics,
            "loss/student": student_loss.detach(),
            "feedback": h,
            "loss/student_labeled": new,
            "loss/feedback": h * feedback.detach(),
        }
