"""Noisy student (https://arxiv.org/abs/1911.04252)."""

from collections.abc import Hashable

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
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig, NoisyStudentConfig

FIXED = LearnerConfig(momentum=0.0, nesterov=False, dropout=0.0)  # of a network that never learns


class NoisyStudent:
    """Cross-entropy on labels, and on strong views with a fixed teacher's labels of weak ones.

    The teacher is in evaluation mode; the student has the noise: strong views and dropout. The
    published code labels an unaugmented view, and augments labeled images as strongly.
    """

    def __init__(
        self, config: NoisyStudentConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        """Without a teacher in the context, another network with random weights is the teacher, as
        for counting what a step costs."""
        self.config, self.microbatches = config, context.microbatches
        self.learner = new_learner(config.learner)
        self.teacher = context.teacher or new_learner(FIXED).infer
        self.learners, self.eval_ensemble = {"learner": self.learner}, EvalEnsemble([self.learner])
        self.state: dict[str, Tensor] = {}

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
        taught = self.teacher(batch.weak)
        pseudo = losses.pseudo_labels(taught)
        hits = pseudo.label == batch.truth
        mask = (pseudo.confidence >= config.threshold).to(pseudo.confidence.dtype)
        hard = config.labels == "argmax"

        logits = self.learner(batch.labeled, batch.strong)
        of_labeled, of_strong = logits.split([len(batch.labels), len(batch.strong)])
        labeled = losses.smoothed_ce(
            of_labeled, batch.labels, label_smoothing=config.label_smoothing
        )
        student = losses.student_loss(
            of_strong,
            pseudo.label if hard else taught / config.temperature,
            label_smoothing=config.label_smoothing if hard else 0.0,
            weight=mask,
        )
        return labeled.loss + config.weight * student, {
            "loss/labeled": labeled.loss.detach(),
            "loss/student": student.detach(),
            "mask_rate": mask.mean(),
            "confidence": pseudo.confidence.mean(),
            "accuracy/labeled": labeled.accuracy,
            "accuracy/pseudo": accuracy_of_known(hits.float().mean(), batch.truth),
        }
