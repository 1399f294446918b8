"""FixMatch (https://arxiv.org/abs/2001.07685)."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.microbatches import mean_metrics, microbatches, scaled
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import FixMatchConfig


class FixMatch:
    """Learns the labels, and on strong views the weak views' labels where they are confident."""

    def __init__(self, config: FixMatchConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config, self.microbatches = config, facts.microbatches
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return ""

    def step(self, batch: Batch, t: int) -> Metrics:
        count, told = self.microbatches, []
        for part in microbatches(batch, count):
            loss, metrics = self._loss(part)
            self.learner.backward(*scaled([loss], count))
            told.append(metrics)
        self.learner.optimizer_step()
        return mean_metrics(told)

    def _loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config, n = self.config, len(batch.weak)
        logits = Views(self.learner, batch, config.bn_batches).logits()
        weak = logits[-2 * n : -n].detach()
        found = losses.pseudo_labels(weak)
        sure = (found.confidence >= config.threshold).to(found.confidence.dtype)
        labeled = losses.smoothed_ce(
            logits[: -2 * n], batch.labels, label_smoothing=config.label_smoothing
        )
        unlabeled = losses.student_loss(logits[-n:], found.label, weight=sure)
        return labeled.loss + config.weight * unlabeled.loss, {
            "loss/labeled": labeled.loss.detach(),
            "loss/consistency": unlabeled.loss.detach(),
            "mask_rate": sure.mean(),
            "confidence": found.confidence.mean(),
            "accuracy/pseudo": (found.label == batch.truth).float().mean(),
        }
