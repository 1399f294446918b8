"""Unsupervised Data Augmentation (https://arxiv.org/abs/1904.12848)."""

from collections.abc import Hashable
from typing import Literal

from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.microbatches import mean_metrics, microbatches, scaled
from mpl_fast.algorithms.views import Views
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, UDAConfig
from mpl_fast.learner import Term


class UDA:
    """Learns the labels, and to answer the strong view as it answers the weak one."""

    def __init__(self, config: UDAConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config, self.microbatches = config, facts.microbatches
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return "" if t >= self.config.consistency.ramp else None

    def step(self, batch: Batch, t: int) -> Metrics:
        config, count, told = self.config, self.microbatches, []
        for part in microbatches(batch, count):
            logits = Views(self.learner, part, config.bn_batches).logits()
            terms, out = uda_loss(logits, part, t, config.consistency, config.label_smoothing)
            self.learner.backward(*scaled(terms, count))
            told.append(uda_metrics(out))
        self.learner.optimizer_step()
        return mean_metrics(told)


def uda_loss(
    logits: Tensor,
    batch: Batch,
    t: int,
    consistency: ConsistencyConfig,
    label_smoothing: float,
    *,
    feedback: Tensor | float = 0.0,
    pseudo: Literal["weak", "strong"] | Tensor = "weak",
) -> tuple[list[Term], losses.TeacherOut]:
    """The loss of step `t` on logits of labeled | weak | strong views, as terms that a learner
    descends, and what it is made of.

    `feedback` weighs the cross-entropy of the strong views with the `pseudo` labels.
    """
    weight, n = consistency.weight_at(t), len(batch.weak)
    cosine = consistency.measure == "cosine"
    out, slope = losses.teacher_loss_and_grad(
        logits,
        batch.labels,
        n,
        uda_weight=0.0 if cosine else weight,
        feedback=feedback,
        temperature=consistency.temperature,
        threshold=consistency.threshold,
        label_smoothing=label_smoothing,
        pseudo=pseudo,
        truth=batch.truth,
    )
    if not cosine:
        return [(logits, slope)], out
    angle = losses.cosine_loss(
        logits[-n:],
        logits[-2 * n : -n].detach(),
        temperature=consistency.temperature,
        threshold=consistency.threshold,
    )
    told = out._replace(loss=out.loss + weight * angle.loss.detach(), uda=angle.loss)
    return [(logits, slope), weight * angle.loss], told


def uda_metrics(out: losses.TeacherOut) -> Metrics:
    """What a loss on labeled, weak and strong views tells about its step."""
    return {
        "loss/labeled": out.sup.detach(),
        "loss/consistency": out.uda.detach(),
        "mask_rate": out.mask_rate,
        "confidence": out.confidence,
        "accuracy/pseudo": out.pseudo_accuracy,
    }
