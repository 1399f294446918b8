"""Self Meta Pseudo Labels (https://arxiv.org/abs/2212.13420)."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import AlgorithmContext, EvalEnsemble, LearnerFactory, Metrics
from mpl_fast.algorithms.feedback import Feedback, make_feedback
from mpl_fast.algorithms.labels import make_labels
from mpl_fast.algorithms.uda import uda_loss
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import SMPLConfig
from mpl_fast.config.algorithms import LabelKind


class SelfMetaPseudoLabels:
    """One network takes a step on its own pseudo labels, then a second step with feedback on them.

    Unlike in the published code, the gradients of the first update are cleared before the second,
    h is old - new, and nothing that should have a gradient is detached.
    """

    def __init__(
        self, config: SMPLConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config = config
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        config = self.config
        if config.repeats_draws or t < max(config.consistency.ramp, config.feedback_ramp):
            return None
        return self.learner.lr == 0.0

    def step(self, batch: Batch, t: int) -> Metrics:
        config, learner = self.config, self.learner

        # First update: pseudo labels of the weak views, learned on the strong ones.
        kind: LabelKind = "soft" if config.feedback == "exact" else "argmax"
        labels = make_labels(learner.forward_no_grad(batch.weak), kind)
        feedback = self._make_feedback(batch)
        strong = learner(batch.strong)  # (U, C)
        student_loss, grad_logits = losses.student_loss_and_grad(
            strong, labels.target, label_smoothing=config.label_smoothing
        )
        rate = learner.backward_and_step((strong, grad_logits))
        feedback.observe_update(strong.detach(), labels, rate)

        # Second update: UDA's loss, and the feedback on the labels of the first update.
        logits = Views(learner, batch).logits()
        weight = config.feedback_weight_at(t)
        loss = uda_loss(logits, batch, t, config, feedback=weight * feedback.ce_weight)
        term = feedback.term(logits.weak)
        learner.backward_and_step(*loss.terms, weight * term)
        return {
            **loss.metrics,
            "loss/student": student_loss,
            "loss/feedback": feedback.ce_weight * loss.out.mpl + term.detach(),
            **feedback.metrics(),
        }

    def _make_feedback(self, batch: Batch) -> Feedback:
        return make_feedback(self.config, self.learner, batch, [batch.strong], fused=True)
