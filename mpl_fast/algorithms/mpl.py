"""Meta Pseudo Labels (https://arxiv.org/abs/2003.10580)."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.feedback import Difference, Exact, Feedback, NoFeedback, PerExample
from mpl_fast.algorithms.labels import Labels, label
from mpl_fast.algorithms.microbatches import mean_metrics, microbatches, scaled, slices
from mpl_fast.algorithms.uda import uda_loss, uda_metrics
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch, joined
from mpl_fast.config import MPLConfig
from mpl_fast.learner import Term, rng


class MetaPseudoLabels:
    """A teacher learns to label unlabeled images so that a student of those labels does well."""

    def __init__(self, config: MPLConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config, self.seed, self.microbatches = config, facts.seed, facts.microbatches
        self.teacher, self.student = new_learner(config.teacher), new_learner(config.student)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.eval_ensemble = EvalEnsemble([self.student])
        self.state: dict[str, Tensor] = {}
        if config.baseline or config.feedback == "parity_google":
            self.state["baseline"] = torch.zeros((), device=self.student.device)

    def graph_key(self, t: int) -> Hashable | None:
        config = self.config
        ramps = t < max(config.consistency.ramp, config.feedback_ramp)
        # What repeats a pass's dropout sets the generator's state, which no graph can.
        repeats = config.teacher_graph == "recompute"
        if ramps or repeats or config.feedback not in ("off", "difference", "sampled"):
            return None
        return self.student.lr == 0.0, self.student.frozen

    def step(self, batch: Batch, t: int) -> Metrics:
        student, teacher, count = self.student, self.teacher, self.microbatches
        own, judging = _share_out(batch, self.config.held_out)
        batches, rows = microbatches(own, count), slices(len(batch.weak), count)
        views = [self._views(part) for part in batches]

        # The teacher labels the unlabeled images ...
        labels = self._label(
            joined([view.detached_logits(self.config.pseudo) for view in views]), t
        )

        # ... the student learns from nothing but those labels ...
        feedback = self._make_feedback([part.strong for part in batches], judging)
        lessons = [
            self._learn(part.strong, labels.of(mine))
            for part, mine in zip(batches, rows, strict=True)
        ]
        rate = student.optimizer_step()

        # ... what that did for it on labeled images tells how good they were ...
        feedback.observe_update(joined([logits for logits, _ in lessons]), labels, rate)

        # ... and the teacher makes helpful ones likelier, while it learns by UDA itself.
        told = []
        for view, part, mine, (_, lesson) in zip(views, batches, rows, lessons, strict=True):
            terms, metrics = self._teach(view.logits(), part, labels, mine, feedback, t)
            teacher.backward(*scaled(terms, count))
            view.clear()
            told.append({**metrics, "loss/student": lesson})
        teacher.optimizer_step()
        return {**mean_metrics(told), **feedback.metrics()}

    def _views(self, batch: Batch) -> Views:
        return Views(
            self.teacher,
            batch,
            self.config.bn_batches,
            weak_gradient=self._feedback_view == "weak",
            recompute=self.config.teacher_graph == "recompute",
        )

    def _learn(self, strong: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """The student's lesson of one part: its logits, as constants, and the loss."""
        logits = self.student(strong)  # (U, C)
        lesson, slope = losses.student_loss_and_grad(
            logits,
            labels.target,
            label_smoothing=self.config.label_smoothing,
            weight=labels.weight,
        )
        self.student.backward(*scaled([(logits, slope)], self.microbatches))
        return logits.detach(), lesson.loss

    def _teach(
        self,
        logits: Tensor,
        batch: Batch,
        labels: Labels,
        rows: slice,
        feedback: Feedback,
        t: int,
    ) -> tuple[list[Term], Metrics]:
        """The teacher's loss on labeled | weak | strong views, whose labels are some `rows` of all,
        and what it tells."""
        labels = labels.of(rows)
        config, n, weight = self.config, len(batch.weak), self.config.feedback_weight_at(t)
        heard = self._feedback_view
        # The plain difference is one more term of the same pass over the logits.
        plain = heard == "strong" and labels.weight is None
        h = feedback.h if plain and isinstance(feedback, Difference) else None
        terms, out = uda_loss(
            logits,
            batch,
            t,
            config.consistency,
            config.label_smoothing,
            feedback=0.0 if h is None else weight * h,
            pseudo=labels.hard,
        )
        if h is not None:
            return terms, {**uda_metrics(out), "loss/feedback": h * out.mpl.detach()}
        view = logits[-n:] if heard == "strong" else logits[-2 * n : -n]
        term = feedback.term(view, labels, rows)
        terms.append(weight * term)
        return terms, {**uda_metrics(out), "loss/feedback": term.detach()}

    @property
    def _feedback_view(self) -> str:
        """The view whose logits the feedback moves.

        A drawn or soft label is credited to the distribution that it comes from; with the arg-max
        nothing is exact, and the published codes move the strong view.
        """
        from_pseudo = self.config.feedback in ("sampled", "per_example", "exact")
        return self.config.pseudo if from_pseudo else "strong"

    def _label(self, logits: Tensor, t: int) -> Labels:
        kind, uniforms = self.config.label_kind, None
        if kind == "sampled":
            uniforms = rng.uniform(len(logits), seed=self.seed, step=t, device=logits.device)
        return label(logits, kind, uniforms=uniforms, threshold=self.config.label_threshold)

    def _make_feedback(self, strong: Sequence[Tensor], judging: Batch) -> Feedback:
        """What hears of the student's next step; silence, if it is not going to move."""
        config, student = self.config, self.student
        images, labels = judging.labeled, judging.labels
        if config.feedback == "off" or student.lr == 0.0:
            return NoFeedback(student, images, labels)
        if config.feedback in ("difference", "sampled"):
            baseline = self.state.get("baseline")
            return Difference(student, images, labels, baseline, config.baseline)
        kind = Exact if config.feedback == "exact" else PerExample
        return kind(student, images, labels, strong, config.label_smoothing, config.derivative)


def count_held_out(labeled: int, share: float) -> int:
    """Labeled images of a rank that only judge; at least one of each kind, if any are held out."""
    return labeled - min(max(1, round(labeled * (1.0 - share))), labeled - 1) if share else 0


def _share_out(batch: Batch, held_out: float) -> tuple[Batch, Batch]:
    """The batch for the teacher's own loss, and the one whose labeled part judges the student."""
    if not held_out:
        return batch, batch
    kept = len(batch.labels) - count_held_out(len(batch.labels), held_out)
    own = batch._replace(labeled=batch.labeled[:kept], labels=batch.labels[:kept])
    return own, batch._replace(labeled=batch.labeled[kept:], labels=batch.labels[kept:])
