"""Labeled images only: the baseline that every other algorithm must beat, and fine-tuning."""

from collections.abc import Hashable

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.microbatches import mean_metrics, scaled, slices
from mpl_fast.batch import Batch
from mpl_fast.config import FinetuneConfig, SupervisedConfig
from mpl_fast.learner import rng

Weighed = tuple[Tensor, Tensor]  # (L,) int64 labels and (L,) float weights


class Supervised:
    """Smoothed cross-entropy on labels."""

    def __init__(
        self, config: SupervisedConfig | FinetuneConfig, new_learner: NewLearner, facts: RunFacts
    ) -> None:
        self.config, self.seed, self.microbatches = config, facts.seed, facts.microbatches
        self.mixup = config.mixup if isinstance(config, SupervisedConfig) else 0.0
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return ""

    def step(self, batch: Batch, t: int) -> Metrics:
        images, targets = self._mixed(batch, t) if self.mixup else (batch.labeled, [])
        count, told = self.microbatches, []
        for rows in slices(len(images), count):
            labels = batch.labels[rows]
            weighed = [(target[rows], weight[rows]) for target, weight in targets]
            loss, metrics = self._loss(images[rows], labels, weighed)
            self.learner.backward(*scaled([loss], count))
            told.append(metrics)
        self.learner.optimizer_step()
        return mean_metrics(told)

    def _loss(
        self, images: Tensor, labels: Tensor, targets: list[Weighed]
    ) -> tuple[Tensor, Metrics]:
        """Of labels, or of weighed `targets` where there are any."""
        logits, label_smoothing = self.learner(images), self.config.label_smoothing
        if not targets:
            out = losses.smoothed_ce(logits, labels, label_smoothing=label_smoothing)
            return out.loss, {"loss/labeled": out.loss.detach(), "accuracy/labeled": out.accuracy}
        loss = logits.new_zeros(())
        for target, weight in targets:
            loss = (
                loss
                + losses.student_loss(
                    logits, target, label_smoothing=label_smoothing, weight=weight
                ).loss
            )
        accuracy = losses.smoothed_ce(logits.detach(), labels).accuracy
        return loss, {"loss/labeled": loss.detach(), "accuracy/labeled": accuracy}

    def _mixed(self, batch: Batch, t: int) -> tuple[Tensor, list[Weighed]]:
        """Each image mixed with the one half a batch away (arXiv 1710.09412), and its two labels.

        A rank has every world-th image of the whole batch, so that half of an even number of its
        own images away is half of the whole batch away: the same partner on any number of ranks.
        """
        labels, far = batch.labels, len(batch.labels) // 2
        share = rng.beta(len(labels), self.mixup, seed=self.seed, step=t, device=labels.device)
        part = share.to(batch.labeled.dtype).view(-1, *(1,) * (batch.labeled.ndim - 1))
        images = batch.labeled * part + batch.labeled.roll(far, 0) * (1 - part)
        return images, [(labels, share), (labels.roll(far, 0), 1 - share)]
