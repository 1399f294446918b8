"""The project's algorithms on many runs at once."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms import Algorithm, AlgorithmContext, build
from mpl_fast.algorithms.base import Metrics
from mpl_fast.algorithms.feedback import ALL, Feedback
from mpl_fast.algorithms.labels import Labels
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.smpl import SelfMetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import (
    ConsistencyConfig,
    LearnerConfig,
    MPLConfig,
    SMPLConfig,
    SupervisedConfig,
)
from mpl_fast.learner import Learner
from tools.studies.two_moons.data import Problem
from tools.studies.two_moons.networks import Networks
from tools.studies.two_moons.variants import Variant

RATE = 0.1  # of plain SGD


def algorithm(variant: Variant, runs: Problem, seed: int) -> Algorithm:
    """The project's algorithm on `Networks`.

    A loss is a mean over the rows of all runs, so that 1 / R of a run's own gradient arrives at its
    weights: R times the learning rate makes it that run's step.
    """
    plain = LearnerConfig(
        lr=RATE * len(runs.labels),
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        max_grad_norm=0.0,
        warmup=0,
        schedule="constant",
    )
    # Points have no augmentation, so there is no consistency loss.
    shared: dict[str, Any] = {
        "label_smoothing": 0.0,
        "consistency": ConsistencyConfig(weight=0.0, ramp=0),
    }
    starts = iter([runs.teacher, runs.student])  # in the order in which learners are made

    def new_learner(config: LearnerConfig) -> Learner:
        return Learner(Networks(next(starts)), config, steps=1)

    options = {**variant.options, "derivative": "forward", **shared}
    context = AlgorithmContext(seed=seed)
    if variant.recipe == "mpl":
        return RunsMPL(MPLConfig(teacher=plain, student=plain, **options), new_learner, context)
    if variant.recipe == "smpl":
        return RunsSMPL(SMPLConfig(learner=plain, **options), new_learner, context)
    return build(SupervisedConfig(learner=plain, label_smoothing=0.0), new_learner, context)


class RunDifference:
    """`DifferenceFeedback` with one h a run: labeled loss before minus after the student's step.

    The project's is one number a batch, and a batch here has the rows of many runs.
    """

    ce_weight = 0.0  # `term` is the whole feedback term

    def __init__(
        self, student: Learner, points: Tensor, labels: Tensor, relabel: bool = False
    ) -> None:
        self._student, self._points, self._labels = student, points, labels
        self._relabel = relabel  # SMPL's term has the labels that the network would give now
        self._old = self._losses()

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self._target, self._new = labels.target, self._losses()
        self._h = self._old - self._new  # (R,)

    def term(self, logits: Tensor, rows: slice = ALL) -> Tensor:
        target = losses.pseudo_labels(logits.detach()).label if self._relabel else self._target
        each_row = self._h.repeat(len(logits) // len(self._h))
        return losses.student_loss(logits, target, weight=each_row)

    def metrics(self) -> Metrics:
        return {"feedback": self._h.mean(), "loss/student_labeled": self._new.mean()}

    def _losses(self) -> Tensor:
        network = self._student.network
        assert isinstance(network, Networks)
        logits = self._student.forward_batch_stats(self._points)
        each_row = F.cross_entropy(logits, self._labels, reduction="none")
        return each_row.view(-1, network.runs).mean(0)


class RunsMPL(MetaPseudoLabels):
    """MPL on many runs at once."""

    def _make_feedback(self, strong: Sequence[Tensor], batch: Batch) -> Feedback:
        if self.config.feedback in ("difference", "sampled"):
            return RunDifference(self.student, batch.labeled, batch.labels)
        return super()._make_feedback(strong, batch)


class RunsSMPL(SelfMetaPseudoLabels):
    """SMPL on many runs at once."""

    def _make_feedback(self, batch: Batch) -> Feedback:
        if self.config.feedback == "difference":
            return RunDifference(self.learner, batch.labeled, batch.labels, relabel=True)
        return super()._make_feedback(batch)
