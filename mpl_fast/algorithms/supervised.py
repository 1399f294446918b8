"""Labeled images only: the baseline that every other algorithm must beat, and fine-tuning."""

from torch import Tensor

from mpl_fast import draws, losses
from mpl_fast.algorithms.base import Metrics, NewLearner, RunFacts, Voters
from mpl_fast.batch import Batch
from mpl_fast.config import FinetuneConfig, SupervisedConfig


class Supervised:
    """Smoothed cross-entropy on labels."""

    def __init__(
        self, config: SupervisedConfig | FinetuneConfig, new_learner: NewLearner, facts: RunFacts
    ) -> None:
        self.config, self.seed = config, facts.seed
        self.mixup = config.mixup if isinstance(config, SupervisedConfig) else 0.0
        self.learner = new_learner(config.learner)
        self.learners, self.voters = {"learner": self.learner}, Voters([self.learner])
        self.state: dict[str, Tensor] = {}

    def step(self, batch: Batch, t: int) -> Metrics:
        if self.mixup:
            return self._mixed_step(batch, t)
        logits = self.learner(batch.labeled)
        out = losses.smoothed_ce(logits, batch.labels, label_smoothing=self.config.smoothing)
        self.learner.descend(out.loss)
        return {"loss/labeled": out.loss.detach(), "accuracy/labeled": out.accuracy}

    def _mixed_step(self, batch: Batch, t: int) -> Metrics:
        """Each image mixed with the one half a batch away (arXiv 1710.09412).

        A rank has every world-th image of the whole batch, so that half of an even number of its
        own images away is half of the whole batch away: the same partner on any number of ranks.
        """
        labels, far = batch.labels, len(batch.labels) // 2
        share = draws.beta(len(labels), self.mixup, seed=self.seed, step=t, device=labels.device)
        part = share.to(batch.labeled.dtype).view(-1, *(1,) * (batch.labeled.ndim - 1))
        logits = self.learner(batch.labeled * part + batch.labeled.roll(far, 0) * (1 - part))
        loss = logits.new_zeros(())
        for target, weight in ((labels, share), (labels.roll(far, 0), 1 - share)):
            smoothing = self.config.smoothing
            out = losses.student_loss(logits, target, label_smoothing=smoothing, weight=weight)
            loss = loss + out.loss
        self.learner.descend(loss)
        accuracy = losses.smoothed_ce(logits.detach(), labels).accuracy
        return {"loss/labeled": loss.detach(), "accuracy/labeled": accuracy}
