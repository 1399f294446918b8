"""FixMatch (https://arxiv.org/abs/2001.07685), and what later papers changed in its targets."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
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
from mpl_fast.distributed import mean_over_ranks_


class _Logits(NamedTuple):
    """Logits of a batch's views; those of the weak one are constants."""

    labeled: Tensor  # (L, C)
    weak: Tensor  # (U, C)
    strong: Tensor  # (U, C)


class FixMatch:
    """Cross-entropy on labels, and on strong views with confident labels of weak ones."""

    def __init__(
        self, config: FixMatchConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config, self.microbatches = config, context.microbatches
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = self._new_state(context.classes)

    def _new_state(self, classes: int) -> dict[str, Tensor]:
        """Moving averages, at their values for uniform predictions."""
        config, device = self.config, self.learner.device
        names = ["label_share", "predicted_share"] if config.alignment else []
        if config.thresholds == "adaptive":
            names += ["class_confidence", "confidence"]
        if names and not classes:
            raise ValueError("alignment and thresholds adaptive need the number of classes")
        return {
            name: torch.full(() if name == "confidence" else (classes,), 1 / classes, device=device)
            for name in names
        }

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
        logits = self._logits(batch)
        weak = self._aligned(logits.weak, batch.labels) if config.alignment else logits.weak
        pseudo = losses.pseudo_labels(weak)
        hits = pseudo.label == batch.truth
        threshold: Tensor | float = config.threshold
        if config.thresholds == "adaptive":
            threshold = self._adapted(weak)[pseudo.label]
        mask = (pseudo.confidence >= threshold).to(pseudo.confidence.dtype)
        labeled = losses.smoothed_ce(
            logits.labeled, batch.labels, label_smoothing=config.label_smoothing
        )
        target = pseudo.label if config.labels == "argmax" else weak / config.temperature
        unlabeled = losses.student_loss(logits.strong, target, weight=mask)
        return labeled.loss + config.weight * unlabeled, {
            "loss/labeled": labeled.loss.detach(),
            "loss/consistency": unlabeled.detach(),
            "mask_rate": mask.mean(),
            "confidence": pseudo.confidence.mean(),
            "accuracy/pseudo": accuracy_of_known(hits.float().mean(), batch.truth),
        }

    def _logits(self, batch: Batch) -> _Logits:
        if self.config.targets == "average":
            weak = self.learner.infer_average(batch.weak)
            logits = self.learner(batch.labeled, batch.strong)
            labeled, strong = logits.split([len(batch.labeled), len(batch.strong)])
            return _Logits(labeled, weak, strong)
        views = Views(self.learner, batch, self.config.bn_batches).logits()
        return _Logits(views.labeled, views.weak.detach(), views.strong)

    def _aligned(self, weak: Tensor, labels: Tensor) -> Tensor:
        """Logits ``(U, C)`` whose mean probabilities are nearer to the shares of the labels."""
        counts = torch.zeros_like(self.state["label_share"])
        counts = counts.scatter_add(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        wanted, predicted = self._followed(
            label_share=counts / max(len(labels), 1),
            predicted_share=weak.float().softmax(-1).mean(0),
        )
        tiny = torch.finfo(wanted.dtype).tiny  # a class may have no label at all
        return weak + (wanted.clamp(min=tiny) / predicted.clamp(min=tiny)).log().to(weak.dtype)

    def _adapted(self, weak: Tensor) -> Tensor:
        """Thresholds ``(C,)``: the mean confidence, times each class's mean probability as a share
        of the largest class's (FreeMatch, arXiv 2205.07246, equations 6 to 8)."""
        probability = weak.float().softmax(-1)
        by_class, confidence = self._followed(
            class_confidence=probability.mean(0), confidence=probability.amax(-1).mean()
        )
        return confidence * by_class / by_class.max()

    def _followed(self, **values: Tensor) -> list[Tensor]:
        """Moving averages in `state`, each moved towards the mean of its value over ranks, unless
        that is not finite; one exchange for all."""
        mean_over_ranks_([*values.values()])
        averages = [self.state[name] for name in values]
        for average, value in zip(averages, values.values(), strict=True):
            moved = average.lerp(value.to(average.dtype), 1.0 - self.config.average_decay)
            average.copy_(torch.where(value.isfinite().all(), moved, average))
        return averages
