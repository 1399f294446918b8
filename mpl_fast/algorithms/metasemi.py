"""MetaSemi: soft labels corrected by the meta-gradient (after Sakura03/SemiMeta, 9f16a1f)."""

from collections.abc import Hashable

import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.batch import Batch
from mpl_fast.config import MetaSemiConfig
from mpl_fast.config.algorithms import ramped
from mpl_fast.learner import rng
from mpl_fast.learner.jvp import log_softmax_jvp

IMPOSSIBLE = 1e-30  # probability that stands for 0 where a logarithm is taken


class MetaSemi:
    """Labels unlabeled images so that learning the labels lowers the labeled loss.

    If the network f learned its own probabilities y = f(x) by mean ||f(x) - y||^2, it would not
    move; changing y by dy would move the weights by rate * 2/U * J^T dy and so the labeled loss by
    rate * 2/U * <J g, dy>, g its gradient. The published step of the labels, rate * 2 J g, is U
    times this meta-gradient: each label goes as if its image were the only one.
    """

    def __init__(self, config: MetaSemiConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config, self.seed = config, facts.seed
        self.learner = new_learner(config.learner)
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

    def graph_key(self, t: int) -> Hashable | None:
        return None  # it sets the state of random generators, which no graph can

    def step(self, batch: Batch, t: int) -> Metrics:
        config, learner = self.config, self.learner
        labels, labeled = self.corrected_labels(batch)  # (U, C) probabilities

        if config.mixup:
            images, mixed = self._mix(batch, labels, t)
            # Cross-entropy with soft labels, given as logits; the entropy of the labels, by which
            # the published divergence differs, has no gradient.
            target = mixed.clamp_min(IMPOSSIBLE).log()
            fit = losses.student_loss(learner(images), target).loss
        else:
            fit = losses.smoothed_ce(learner(batch.labeled), batch.labels).loss
        logits = learner(batch.weak).to(labels.dtype)
        consistency = (logits.softmax(-1) - labels).square().sum(-1).mean()
        learner.backward_and_step(fit + ramped(config.weight, config.ramp, t) * consistency)
        return {
            "loss/labeled": labeled,
            "loss/fit": fit.detach(),
            "loss/consistency": consistency.detach(),
            "confidence": labels.amax(-1).mean(),
            "accuracy/pseudo": (labels.argmax(-1) == batch.truth).float().mean(),
        }

    def corrected_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Probabilities ``(U, C)`` and the labeled loss of this rank, 0-dim.

        normalize(relu(p - rate * 2 J g)) for p = softmax f(weak), in evaluation mode; g is averaged
        over ranks, and the network is not touched. (Published: J g by differences of p. Here they
        are those of the logits, and softmax is differentiated exactly.)
        """
        config, learner = self.config, self.learner
        gradient, labeled = learner.labeled_gradient(
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
        return moved / moved.sum(-1, keepdim=True), labeled

    def _mix(self, batch: Batch, labels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Every unlabeled image mixed with a labeled one, and the probabilities likewise."""
        n, alpha = len(batch.weak), self.config.mixup
        share = rng.beta(n, alpha, seed=self.seed, step=t, device=labels.device)
        # In turn, where there are fewer labeled images.
        partner = torch.arange(n, device=labels.device) % len(batch.labels)
        truth = torch.nn.functional.one_hot(batch.labels[partner], labels.shape[-1])
        part = share.to(labels.dtype)[:, None]
        mixed = part * truth + (1 - part) * labels
        part = share.to(batch.weak.dtype).view(-1, *(1,) * (batch.weak.ndim - 1))
        return part * batch.labeled[partner] + (1 - part) * batch.weak, mixed
