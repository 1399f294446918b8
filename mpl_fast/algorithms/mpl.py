"""Meta Pseudo Labels (https://arxiv.org/abs/2003.10580)."""

import torch
from torch import Tensor

from mpl_fast import draws, losses
from mpl_fast.algorithms.base import Metrics, NewLearner, RunFacts, Voters
from mpl_fast.algorithms.feedback import Difference, Exact, Feedback, PerExample, Silence
from mpl_fast.algorithms.labels import Labels, label
from mpl_fast.algorithms.uda import uda_loss, uda_metrics
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import MPLConfig


class MetaPseudoLabels:
    """A teacher learns to label unlabeled images so that a student of those labels does well."""

    def __init__(self, config: MPLConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config, self.seed = config, facts.seed
        self.teacher, self.student = new_learner(config.teacher), new_learner(config.student)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.voters = Voters([self.student])
        self.state: dict[str, Tensor] = {}
        if config.baseline or config.feedback == "parity_google":
            self.state["baseline"] = torch.zeros((), device=self.student.device)

    def step(self, batch: Batch, t: int) -> Metrics:
        config, teacher, student = self.config, self.teacher, self.student
        own, judging = _share_out(batch, config.held_out)
        views = Views(
            teacher,
            own,
            config.bn_batches,
            weak_gradient=self._view_heard == "weak",
            recompute=config.teacher_graph == "recompute",
        )

        # The teacher labels the unlabeled images ...
        labels = self._label(views.peek(config.pseudo), t)

        # ... the student learns from nothing but those labels ...
        feedback = self._listen(batch, judging)
        strong = student(batch.strong)  # (U, C)
        lesson = losses.student_loss(
            strong, labels.target, label_smoothing=config.smoothing, weight=labels.weight
        )
        rate = student.descend(lesson.loss)

        # ... what that did for it on labeled images tells how good they were ...
        feedback.ask(strong.detach(), labels, rate)

        # ... and the teacher makes helpful ones likelier, while it learns by UDA itself.
        loss, metrics = self._teach(views.logits(), own, labels, feedback, t)
        teacher.descend(loss)
        return {**metrics, "loss/student": lesson.loss.detach(), **feedback.metrics()}

    def _teach(
        self, logits: Tensor, batch: Batch, labels: Labels, feedback: Feedback, t: int
    ) -> tuple[Tensor, Metrics]:
        """The teacher's loss on labeled | weak | strong views, and what it tells."""
        config, n, weight = self.config, len(batch.weak), self.config.feedback_weight_at(t)
        heard = self._view_heard
        # The plain difference is one more term of the same pass over the logits.
        plain = heard == "strong" and labels.weight is None
        h = feedback.h if plain and isinstance(feedback, Difference) else None
        loss, out = uda_loss(
            logits,
            batch,
            t,
            config.consistency,
            config.smoothing,
            feedback=0.0 if h is None else weight * h,
            pseudo=labels.hard,
        )
        if h is not None:
            return loss, {**uda_metrics(out), "loss/feedback": h * out.mpl.detach()}
        term = feedback.term(logits[-n:] if heard == "strong" else logits[-2 * n : -n], labels)
        loss = loss + weight * term
        return loss, {**uda_metrics(out), "loss/feedback": term.detach()}

    @property
    def _view_heard(self) -> str:
        """The view whose logits the feedback moves.

        A drawn or soft label is credited to the distribution that it comes from; with the arg-max
        nothing is exact, and the published codes move the strong view.
        """
        from_pseudo = self.config.feedback in ("sampled", "per_example", "exact")
        return self.config.pseudo if from_pseudo else "strong"

    def _label(self, logits: Tensor, t: int) -> Labels:
        kind, uniforms = self.config.label_kind, None
        if kind == "sampled":
            uniforms = draws.uniform(len(logits), seed=self.seed, step=t, device=logits.device)
        return label(logits, kind, uniforms=uniforms, threshold=self.config.label_threshold)

    def _listen(self, batch: Batch, judging: Batch) -> Feedback:
        """What hears of the student's next step; silence, if it is not going to move."""
        config, student = self.config, self.student
        images, labels = judging.labeled, judging.labels
        if config.feedback == "off" or student.lr == 0.0:
            return Silence(student, images, labels)
        if config.feedback in ("difference", "sampled"):
            baseline = self.state.get("baseline")
            return Difference(student, images, labels, baseline, config.baseline)
        kind = Exact if config.feedback == "exact" else PerExample
        return kind(student, images, labels, batch.strong, config.smoothing, config.derivative)


def _share_out(batch: Batch, held_out: float) -> tuple[Batch, Batch]:
    """The batch for the teacher's own loss, and the one whose labeled part judges the student."""
    if not held_out:
        return batch, batch
    kept = min(max(1, round(len(batch.labels) * (1.0 - held_out))), len(batch.labels) - 1)
    own = batch._replace(labeled=batch.labeled[:kept], labels=batch.labels[:kept])
    return own, batch._replace(labeled=batch.labeled[kept:], labels=batch.labels[kept:])
