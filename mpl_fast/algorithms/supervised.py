"""Supervised training on labeled images, the baseline of the other algorithms; also fine-tuning."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import AlgorithmContext, EvalEnsemble, LearnerFactory, Metrics
from mpl_fast.algorithms.microbatches import mean_metrics, row_slices
from mpl_fast.batch import Batch
from mpl_fast.config import FinetuneConfig, SupervisedConfig
from mpl_fast.learner import rng

WeightedTarget = tuple[Tensor, Tensor]  # (L,) int64 classes and (L,) float32 weights


class Supervised:
    """Cross-entropy with label smoothing, optionally on mixup images."""

    def __init__(
        self,
        config: SupervisedConfig | FinetuneConfig,
        new_learner: LearnerFactory,
        context: AlgorithmContext,
    ) -> None:
        self.config, self.seed, self.microbatches = config, context.seed, context.microbatches
        self.mixup = config.mixup if isinstance(config, SupervisedConfig) else 0.0
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return ""

    def step(self, batch: Batch, t: int) -> Metrics:
        images, targets = self._mixup(batch, t) if self.mixup else (batch.labeled, [])
        metrics = []
        for rows in row_slices(len(images), self.microbatches):
            part_targets = [(target[rows], weight[rows]) for target, weight in targets]
            loss, part_metrics = self._loss(images[rows], batch.labels[rows], part_targets)
            self.learner.backward(loss, microbatches=self.microbatches)
            metrics.append(part_metrics)
        self.learner.optimizer_step()
        return mean_metrics(metrics)

    def _loss(
        self, images: Tensor, labels: Tensor, targets: list[WeightedTarget]
    ) -> tuple[Tensor, Metrics]:
        """The loss on the labels, or on the mixup targets if there are any."""
        logits, smoothing = self.learner(images), self.config.label_smoothing
        if not targets:
            out = losses.smoothed_ce(logits, labels, label_smoothing=smoothing)
            return out.loss, {"loss/labeled": out.loss.detach(), "accuracy/labeled": out.accuracy}
        loss = logits.new_zeros(())
        for target, weight in targets:
            loss = loss + losses.student_loss(
                logits, target, label_smoothing=smoothing, weight=weight
            )
        accuracy = losses.smoothed_ce(logits.detach(), labels).accuracy
        return loss, {"loss/labeled": loss.detach(), "accuracy/labeled": accuracy}

    def _mixup(self, batch: Batch, t: int) -> tuple[Tensor, list[WeightedTarget]]:
        """Mixes each image with the one half a batch away (arXiv 1710.09412); both its targets.

        A rank holds every world-th image of the global batch, so half of its (even) number of
        images is half of the global batch: the partner is the same for any number of ranks.
        """
        labels, half = batch.labels, len(batch.labels) // 2
        share = rng.beta(len(labels), self.mixup, seed=self.seed, step=t, device=labels.device)
        factor = share.to(batch.labeled.dtype).view(-1, *(1,) * (batch.labeled.ndim - 1))
        images = batch.labeled * factor + batch.labeled.roll(half, 0) * (1 - factor)
        return images, [(labels, share), (labels.roll(half, 0), 1 - share)]
