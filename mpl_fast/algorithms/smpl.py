"""Self Meta Pseudo Labels (https://arxiv.org/abs/2212.13420)."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.feedback import Difference, Exact, NoFeedback
from mpl_fast.algorithms.labels import label
from mpl_fast.algorithms.uda import uda_loss, uda_metrics
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import SMPLConfig


class SelfMetaPseudoLabels:
    """One network learns its own pseudo labels, and then, knowing what that did, labels better.

    Two updates a step. Unlike the published code: the gradients of the first are gone before the
    second, h is old - new, and nothing that should have a gradient is detached.
    """

    def __init__(self, config: SMPLConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config = config
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        config = self.config
        if t < config.consistency.ramp or t < config.feedback_ramp or config.feedback == "exact":
            return None
        return self.learner.lr == 0.0

    def step(self, batch: Batch, t: int) -> Metrics:
        config, learner = self.config, self.learner

        # First update: the network's own labels of the weak views, learned on the strong ones.
        kind = "soft" if config.feedback == "exact" else "argmax"
        labels = label(learner.forward_no_grad(batch.weak), kind)
        feedback = self._make_feedback(batch)
        strong = learner(batch.strong)  # (U, C)
        lesson, slope = losses.student_loss_and_grad(
            strong, labels.target, label_smoothing=config.label_smoothing
        )
        rate = learner.backward_and_step((strong, slope))
        feedback.observe_update(strong.detach(), labels, rate)

        # Second update: the labels, agreement between the views, and the labels that helped.
        logits = Views(learner, batch).logits()  # (L + 2U, C)
        weight, n = config.feedback_weight_at(t), len(batch.weak)
        h = feedback.h if isinstance(feedback, Difference) else 0.0
        terms, out = uda_loss(
            logits, batch, t, config.consistency, config.label_smoothing, feedback=weight * h
        )
        term = h * out.mpl.detach()
        if isinstance(feedback, Exact):
            term = feedback.term(logits[-2 * n : -n], labels)
            terms.append(weight * term)
        learner.backward_and_step(*terms)
        lessons = {"loss/student": lesson.loss, "loss/feedback": term.detach()}
        return {**uda_metrics(out), **lessons, **feedback.metrics()}

    def _make_feedback(self, batch: Batch) -> Difference | Exact | NoFeedback:
        config, learner = self.config, self.learner
        images, labels = batch.labeled, batch.labels
        if config.feedback == "off" or learner.lr == 0.0:
            return NoFeedback(learner, images, labels)
        if config.feedback == "difference":
            return Difference(learner, images, labels)
        return Exact(
            learner, images, labels, [batch.strong], config.label_smoothing, config.derivative
        )
