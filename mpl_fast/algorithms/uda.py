"""Unsupervised Data Augmentation (https://arxiv.org/abs/1904.12848)."""

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics, NewLearner
from mpl_fast.batch import Batch
from mpl_fast.config import UDAConfig


class UDA:
    """Learns the labels, and to answer the strong view as it answers the weak one."""

    def __init__(self, config: UDAConfig, new_learner: NewLearner) -> None:
        self.config = config
        self.learner = new_learner(config.learner)
        self.learners, self.voters = {"learner": self.learner}, [self.learner]

    def step(self, batch: Batch, t: int) -> Metrics:
        consistency = self.config.consistency
        out = losses.teacher_loss(
            self.learner(batch.labeled, batch.weak, batch.strong),
            batch.labels,
            len(batch.weak),
            uda_weight=consistency.weight_at(t),
            feedback=0.0,
            temperature=consistency.temperature,
            threshold=consistency.threshold,
            label_smoothing=self.config.smoothing,
            truth=batch.truth,
        )
        self.learner.descend(out.loss)
        return uda_metrics(out)


def uda_metrics(out: losses.TeacherOut) -> Metrics:
    """What a loss on labeled, weak and strong views tells about its step."""
    return {
        "loss/labeled": out.sup.detach(),
        "loss/consistency": out.uda.detach(),
        "mask_rate": out.mask_rate,
        "confidence": out.confidence,
        "accuracy/pseudo": out.pseudo_accuracy,
    }
