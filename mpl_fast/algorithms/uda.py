"""Unsupervised Data Augmentation (https://arxiv.org/abs/1904.12848)."""

from collections.abc import Hashable
from typing import Literal, NamedTuple

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
from mpl_fast.algorithms.views import ViewLogits, Views
from mpl_fast.batch import Batch
from mpl_fast.config import MPLConfig, SMPLConfig, UDAConfig
from mpl_fast.learner import Term


class UDA:
    """Cross-entropy on labels, and consistency of the strong view with the weak one."""

    def __init__(
        self, config: UDAConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config, self.microbatches = config, context.microbatches
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return "" if t >= self.config.consistency.ramp else None

    def step(self, batch: Batch, t: int) -> Metrics:
        config, metrics = self.config, []
        for part in microbatches(batch, self.microbatches):
            logits = Views(self.learner, part, config.bn_batches).logits()
            loss = uda_loss(logits, part, t, config)
            self.learner.backward(*loss.terms, microbatches=self.microbatches)
            metrics.append(loss.metrics)
        self.learner.optimizer_step()
        return mean_metrics(metrics)


class UDALoss(NamedTuple):
    """A loss, its parts and the metrics of a step that minimizes it."""

    terms: list[Term]  # for `Learner.backward`
    out: losses.TeacherOut  # values, detached
    metrics: Metrics


def uda_loss(
    logits: ViewLogits,
    batch: Batch,
    t: int,
    config: UDAConfig | MPLConfig | SMPLConfig,
    *,
    feedback: Tensor | float = 0.0,
    pseudo: Literal["weak", "strong"] | Tensor = "weak",
) -> UDALoss:
    """Labeled cross-entropy plus the weighted consistency of step `t`, plus `feedback` (0-dim)
    times the cross-entropy of the strong views with the `pseudo` labels."""
    consistency = config.consistency
    weight = consistency.weight_at(t)
    cosine = consistency.measure == "cosine"
    out, grad_logits = losses.teacher_loss_and_grad(
        logits.all,
        batch.labels,
        len(batch.weak),
        uda_weight=0.0 if cosine else weight,
        feedback=feedback,
        temperature=consistency.temperature,
        threshold=consistency.threshold,
        label_smoothing=config.label_smoothing,
        pseudo=pseudo,
        truth=batch.truth,
    )
    terms: list[Term] = [(logits.all, grad_logits)]
    if cosine:
        distance = losses.cosine_loss(
            logits.strong,
            logits.weak.detach(),
            temperature=consistency.temperature,
            threshold=consistency.threshold,
        ).loss
        terms.append(weight * distance)
        out = out._replace(loss=out.loss + weight * distance.detach(), uda=distance.detach())
    metrics = {
        "loss/labeled": out.sup,
        "loss/consistency": out.uda,
        "mask_rate": out.mask_rate,
        "confidence": out.confidence,
        "accuracy/pseudo": accuracy_of_known(out.pseudo_accuracy, batch.truth),
    }
    return UDALoss(terms, out, metrics)
