"""MetaSemi: soft labels corrected by the meta-gradient (after Sakura03/SemiMeta, 9f16a1f)."""

from collections.abc import Hashable

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
from mpl_fast.batch import Batch
from mpl_fast.config import MetaSemiConfig
from mpl_fast.config.algorithms import ramped
from mpl_fast.learner import rng
from mpl_fast.learner.jvp import log_softmax_jvp

MIN_PROBABILITY = 1e-30  # in place of 0 where a logarithm is taken


class MetaSemi:
    """Corrects the soft labels of unlabeled images so that learning them lowers the labeled loss.

    If the network f learned its own probabilities y = f(x) by mean ||f(x) - y||^2, it would not
    move; changing y by dy would move the weights by rate * 2/U * J^T dy and so the labeled loss by
    rate * 2/U * <J g, dy>, g its gradient. The published step of the labels, rate * 2 J g, is U
    times this meta-gradient: each label is corrected as if its image were the only one.
    """

    def __init__(
        self, config: MetaSemiConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config, self.seed = config, context.seed
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return None  # see `repeats_draws` of its config

    def step(self, batch: Batch, t: int) -> Metrics:
        config, learner = self.config, self.learner
        labels, labeled_loss = self.corrected_labels(batch)  # (U, C) probabilities

        if config.mixup:
            images, mixed = self._mixup(batch, labels, t)
            # Cross-entropy with soft labels, given as logits; the published divergence differs by
            # the entropy of the labels, which has no gradient.
            target = mixed.clamp_min(MIN_PROBABILITY).log()
            fit = losses.student_loss(learner(images), target)
        else:
            fit = losses.smoothed_ce(learner(batch.labeled), batch.labels).loss
        logits = learner(batch.weak).to(labels.dtype)
        hits = labels.argmax(-1) == batch.truth
        consistency = (logits.softmax(-1) - labels).square().sum(-1).mean()
        learner.backward_and_step(fit + ramped(config.weight, config.ramp, t) * consistency)
        return {
            "loss/labeled": labeled_loss,
            "loss/fit": fit.detach(),
            "loss/consistency": consistency.detach(),
            "confidence": labels.amax(-1).mean(),
            "accuracy/pseudo": accuracy_of_known(hits.float().mean(), batch.truth),
        }

    def corrected_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Soft labels of the weak views, ``(U, C)`` probabilities, and this rank's labeled loss.

        normalize(relu(p - rate * 2 J g)) for p = softmax f(weak), in evaluation mode; g is averaged
        over ranks, and the network does not change. (Published: J g by differences of p. Here they
        are differences of the logits, and softmax is differentiated exactly.)
        """
        config, learner = self.config, self.learner
        gradient, labeled_loss = learner.labeled_gradient(
            batch.labeled, batch.labels, statistics="running"
        )
        logits = learner.infer(batch.weak)
        change = learner.jvp(
            learner.weights(),
            gradient,
            batch.weak,
            config.derivative,
            config.epsilon,
            training=False,
        )
        p = logits.to(change.dtype).softmax(-1)
        rate = config.label_rate or learner.lr
        moved = (p - rate * 2.0 * p * log_softmax_jvp(logits, change)).relu()
        # Never a division by 0: a row of J g sums to 0, so what is left of one sums to 1 or more.
        return moved / moved.sum(-1, keepdim=True), labeled_loss

    def _mixup(self, batch: Batch, labels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Each unlabeled image mixed with a labeled one; their soft labels ``(U, C)``."""
        n, alpha = len(batch.weak), self.config.mixup
        share = rng.beta(n, alpha, seed=self.seed, step=t, device=labels.device)
        # Labeled images repeat if there are fewer of them.
        partner = torch.arange(n, device=labels.device) % len(batch.labels)
        truth = torch.nn.functional.one_hot(batch.labels[partner], labels.shape[-1])
        factor = share.to(labels.dtype)[:, None]
        mixed = factor * truth + (1 - factor) * labels
        factor = share.to(batch.weak.dtype).view(-1, *(1,) * (batch.weak.ndim - 1))
        return factor * batch.labeled[partner] + (1 - factor) * batch.weak, mixed
