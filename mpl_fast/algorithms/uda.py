"""Unsupervised Data Augmentation (https://arxiv.org/abs/1904.12848)."""

from typing import Literal

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import Metrics, NewLearner, Voters
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, UDAConfig


class UDA:
    """Learns the labels, and to answer the strong view as it answers the weak one."""

    def __init__(self, config: UDAConfig, new_learner: NewLearner) -> None:
        self.config = config
        self.learner = new_learner(config.learner)
        self.learners, self.voters = {"learner": self.learner}, Voters([self.learner])
        self.state: dict[str, Tensor] = {}

    def step(self, batch: Batch, t: int) -> Metrics:
        logits = Views(self.learner, batch, self.config.bn_batches).logits()
        loss, out = uda_loss(logits, batch, t, self.config.consistency, self.config.smoothing)
        self.learner.descend(loss)
        return uda_metrics(out)


def uda_loss(
    logits: Tensor,
    batch: Batch,
    t: int,
    consistency: ConsistencyConfig,
    smoothing: float,
    *,
    feedback: Tensor | float = 0.0,
    pseudo: Literal["weak", "strong"] | Tensor = "weak",
) -> tuple[Tensor, losses.TeacherOut]:
    """The loss of step `t` on logits of labeled | weak | strong views, and what it is made of.

    `feedback` weighs the cross-entropy of the strong views with the `pseudo` labels.
    """
    weight, n = consistency.weight_at(t), len(batch.weak)
    cosine = consistency.measure == "cosine"
    out = losses.teacher_loss(
        logits,
        batch.labels,
        n,
        uda_weight=0.0 if cosine else weight,
        feedback=feedback,
        temperature=consistency.temperature,
        threshold=consistency.threshold,
        label_smoothing=smoothing,
        pseudo=pseudo,
        truth=batch.truth,
    )
    if not cosine:
        return out.loss, out
    angle = losses.cosine_loss(
        logits[-n:],
        logits[-2 * n : -n].detach(),
        temperature=consistency.temperature,
        threshold=consistency.threshold,
    )
    return out.loss + weight * angle.loss, out._replace(uda=angle.loss)


def uda_metrics(out: losses.TeacherOut) -> Metrics:
    """What a loss on labeled, weak and strong views tells about its step."""
    return {
        "loss/labeled": out.sup.detach(),
        "loss/consistency": out.uda.detach(),
        "mask_rate": out.mask_rate,
        "confidence": out.confidence,
        "accuracy/pseudo": out.pseudo_accuracy,
    }
