"""Meta Pseudo Labels (https://arxiv.org/abs/2003.10580)."""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import AlgorithmContext, EvalEnsemble, LearnerFactory, Metrics
from mpl_fast.algorithms.feedback import Feedback, make_feedback
from mpl_fast.algorithms.labels import Labels, make_labels
from mpl_fast.algorithms.microbatches import mean_metrics, microbatches, row_slices
from mpl_fast.algorithms.uda import uda_loss
from mpl_fast.algorithms.views import ViewLogits, Views
from mpl_fast.batch import Batch, joined
from mpl_fast.config import MPLConfig
from mpl_fast.learner import rng


class MetaPseudoLabels:
    """A teacher learns to give labels on which a student improves on labeled images."""

    def __init__(
        self, config: MPLConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config, self.seed, self.microbatches = config, context.seed, context.microbatches
        self.teacher, self.student = new_learner(config.teacher), new_learner(config.student)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.eval_ensemble = EvalEnsemble([self.student])
        self.state: dict[str, Tensor] = {}
        if config.baseline or config.feedback == "parity_google":
            self.state["baseline"] = torch.zeros((), device=self.student.device)

    def graph_key(self, t: int) -> Hashable | None:
        config = self.config
        if config.repeats_draws or t < max(config.consistency.ramp, config.feedback_ramp):
            return None
        return self.student.lr == 0.0, self.student.frozen

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        own, held_out = hold_out_labeled(batch, config.held_out)
        parts = microbatches(own, self.microbatches)
        rows = row_slices(len(batch.weak), self.microbatches)
        views = [
            Views(
                teacher,
                part,
                config.bn_batches,
                weak_gradient=self.feedback_view == "weak",
                recompute=config.teacher_graph == "recompute",
            )
            for part in parts
        ]

        # The teacher labels the unlabeled images.
        logits = joined([view.detached_logits(config.pseudo) for view in views])  # (U, C)
        labels = self._make_labels(logits, t)

        # The student takes one step on these labels and nothing else.
        feedback = self._make_feedback([part.strong for part in parts], held_out)
        passes = [
            self._student_backward(part.strong, labels.select(r))
            for part, r in zip(parts, rows, strict=True)
        ]
        rate = student.optimizer_step()

        # The effect of that step on the student's labeled loss is the feedback on the labels.
        feedback.observe_update(joined([logits for logits, _ in passes]), labels, rate)

        # The teacher takes one step on UDA's loss and the feedback term.
        metrics = []
        for part, r, view, (_, loss) in zip(parts, rows, views, passes, strict=True):
            part_metrics = self._teacher_backward(view.logits(), part, labels, r, feedback, t)
            metrics.append({**part_metrics, "loss/student": loss})
        teacher.optimizer_step()
        return {**mean_metrics(metrics), **feedback.metrics()}

    def _student_backward(self, strong: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of one microbatch: detached logits ``(U, C)``, and the loss."""
        logits = self.student(strong)
        loss, grad_logits = losses.student_loss_and_grad(
            logits, labels.target, label_smoothing=self.config.label_smoothing, weight=labels.weight
        )
        self.student.backward((logits, grad_logits), microbatches=self.microbatches)
        return logits.detach(), loss

    def _teacher_backward(
        self,
        logits: ViewLogits,
        batch: Batch,
        labels: Labels,
        rows: slice,
        feedback: Feedback,
        t: int,
    ) -> Metrics:
        """Backward pass of one microbatch, whose labels are `rows` of all."""
        config, weight = self.config, self.config.feedback_weight_at(t)
        loss = uda_loss(
            logits, batch, t, config, feedback=weight * feedback.ce_weight, pseudo=labels.hard[rows]
        )
        term = feedback.term(logits.strong if self.feedback_view == "strong" else logits.weak, rows)
        self.teacher.backward(*loss.terms, weight * term, microbatches=self.microbatches)
        value = feedback.ce_weight * loss.out.mpl + term.detach()
        return {**loss.metrics, "loss/feedback": value}

    @property
    def feedback_view(self) -> Literal["weak", "strong"]:
        """The view whose logits get the feedback's gradient.

        A drawn or soft label is credited to the distribution that it comes from. For arg-max labels
        no choice is exact, and the published codes take the strong view.
        """
        from_pseudo = self.config.feedback in ("sampled", "per_example", "exact")
        return self.config.pseudo if from_pseudo else "strong"

    def _make_labels(self, logits: Tensor, t: int) -> Labels:
        kind, uniforms = self.config.label_kind, None
        if kind == "sampled":
            uniforms = rng.uniform(len(logits), seed=self.seed, step=t, device=logits.device)
        return make_labels(logits, kind, uniforms=uniforms, threshold=self.config.label_threshold)

    def _make_feedback(self, strong: Sequence[Tensor], batch: Batch) -> Feedback:
        """By the labeled images of `batch`. `strong`: the images of the student's passes."""
        config, baseline = self.config, self.state.get("baseline")
        fused = self.feedback_view == "strong" and not config.label_threshold
        return make_feedback(
            config, self.student, batch, strong, baseline, config.baseline, fused=fused
        )


def count_held_out(labeled: int, share: float) -> int:
    """How many of a rank's labeled images only measure the feedback: for a share above 0 at least
    one, and at most all but one."""
    return labeled - min(max(1, round(labeled * (1.0 - share))), labeled - 1) if share else 0


def hold_out_labeled(batch: Batch, share: float) -> tuple[Batch, Batch]:
    """The batch of the teacher's own loss, and the one whose labeled images measure the feedback.

    They share no labeled image, or, for a share of 0, are the same batch.
    """
    if not share:
        return batch, batch
    kept = len(batch.labels) - count_held_out(len(batch.labels), share)
    own = batch._replace(labeled=batch.labeled[:kept], labels=batch.labels[:kept])
    return own, batch._replace(labeled=batch.labeled[kept:], labels=batch.labels[kept:])
