"""Labeled images only: the baseline that every other algorithm must beat."""

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics, NewLearner
from mpl_fast.batch import Batch
from mpl_fast.config import SupervisedConfig


class Supervised:
    """Smoothed cross-entropy on labels."""

    def __init__(self, config: SupervisedConfig, new_learner: NewLearner) -> None:
        self.config = config
        self.learner = new_learner(config.learner)
        self.learners, self.voters = {"learner": self.learner}, [self.learner]

    def step(self, batch: Batch, t: int) -> Metrics:
        logits = self.learner(batch.labeled)
        out = losses.smoothed_ce(logits, batch.labels, label_smoothing=self.config.smoothing)
        self.learner.descend(out.loss)
        return {"loss/labeled": out.loss.detach(), "accuracy/labeled": out.accuracy}
