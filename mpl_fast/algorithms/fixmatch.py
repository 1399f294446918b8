"""FixMatch (https://arxiv.org/abs/2001.07685)."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import (
    AlgorithmContext,
    EvalEnsemble,
    LearnerFactory,
    Metrics,
    accuracy_of_known,
)
from mpl_fast.algorithms.microbatches import mean_metrics, microbatches
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import FixMatchConfig


class FixMatch:
    """Cross-entropy on labels, and on strong views with confident arg-max labels of weak ones."""

    def __init__(
        self, config: FixMatchConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config, self.microbatches = config, context.microbatches
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return ""

    def step(self, batch: Batch, t: int) -> Metrics:
        metrics = []
        for part in microbatches(batch, self.microbatches):
            loss, part_metrics = self._loss(part)
            self.learner.backward(loss, microbatches=self.microbatches)
            metrics.append(part_metrics)
        self.learner.optimizer_step()
        return mean_metrics(metrics)

    def _loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        logits = Views(self.learner, batch, config.bn_batches).logits()
        pseudo = losses.pseudo_labels(logits.weak.detach())
        hits = pseudo.label == batch.truth
        mask = (pseudo.confidence >= config.threshold).to(pseudo.confidence.dtype)
        labeled = losses.smoothed_ce(
            logits.labeled, batch.labels, label_smoothing=config.label_smoothing
        )
        unlabeled = losses.student_loss(logits.strong, pseudo.label, weight=mask)
        return labeled.loss + config.weight * unlabeled, {
            "loss/labeled": labeled.loss.detach(),
            "loss/consistency": unlabeled.detach(),
            "mask_rate": mask.mean(),
            "confidence": pseudo.confidence.mean(),
            "accuracy/pseudo": accuracy_of_known(hits.float().mean(), batch.truth),
        }
