"""The project's algorithms on many runs at once."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms import Algorithm, RunFacts, build
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

    options, facts = {**variant.options, "derivative": "forward", **shared}, RunFacts(seed=seed)
    if variant.recipe == "mpl":
        return RunsMPL(MPLConfig(teacher=plain, student=plain, **options), new_learner, facts)
    if variant.recipe == "smpl":
        return RunsSMPL(SMPLConfig(learner=plain, **options), new_learner, facts)
    return build(SupervisedConfig(learner=plain, label_smoothing=0.0), new_learner, facts)


class RunDifference:
    """`feedback.Difference` with one h a run: labeled loss before minus after the student's step.

    The project's is one number a batch, and a batch here has the rows of many runs.
    """

    def __init__(
        self, student: Learner, points: Tensor, labels: Tensor, relabel: bool = False
    ) -> None:
        self._student, self._points, self._labels = student, points, labels
        self._relabel = relabel  # the term has the arg-max of the logits that it is given
        self._old = self._losses()

    def observe_update(self, strong: Tensor, labels: Labels, rate: Tensor) -> None:
        self.new = self._losses()
        self.h = self._old - self.new  # (R,)

    def term(self, view: Tensor, labels: Labels, rows: slice = ALL) -> Tensor:
        target = losses.pseudo_labels(view.detach()).label if self._relabel else labels.target
        each_row = self.h.repeat(len(view) // len(self.h))
        return losses.student_loss(view, target, weight=each_row).loss

    def metrics(self) -> Metrics:
        return {"h": self.h.mean(), "loss/student_labeled": self.new.mean()}

    def _losses(self) -> Tensor:
        network = self._student.network
        assert isinstance(network, Networks)
        logits = self._student.forward_batch_stats(self._points)
        return (
            F.cross_entropy(logits, self._labels, reduction="none").view(-1, network.runs).mean(0)
        )


class RunsMPL(MetaPseudoLabels):
    """MPL on many runs at once."""

    def _make_feedback(self, strong: Sequence[Tensor], judging: Batch) -> Feedback:
        if self.config.feedback in ("difference", "sampled"):
            return RunDifference(self.student, judging.labeled, judging.labels)
        return super()._make_feedback(strong, judging)


class RunsSMPL(SelfMetaPseudoLabels):
    """SMPL on many runs at once."""

    def _make_feedback(self, batch: Batch) -> Feedback:
        if self.config.feedback == "difference":
            return RunDifference(self.learner, batch.labeled, batch.labels, relabel=True)
        return super()._make_feedback(batch)
