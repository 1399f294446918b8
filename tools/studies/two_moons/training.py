"""Trains every variant with `mpl_fast.algorithms`, all runs at once, and compares accuracies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast import losses
from mpl_fast.algorithms import Algorithm, RunFacts, build
from mpl_fast.algorithms.base import Metrics, train_step
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
from mpl_fast.errors import NonFiniteError
from mpl_fast.learner.learner import Learner
from tools.studies.two_moons.data import (
    SETTINGS,
    Array,
    Options,
    Problem,
    Setting,
    problem,
    stacked,
)
from tools.studies.two_moons.networks import Networks, Weights, chosen, predict
from tools.studies.two_moons.variants import VARIANTS, Variant

RATE = 0.1  # of plain SGD


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


@dataclass(frozen=True, kw_only=True)
class Result:
    """One variant in one setting."""

    weights: Weights  # of the student or the only network, after the last step
    accuracy: Array  # (draws, inits) percent; of the same
    teacher_accuracy: Array | None  # (draws, inits) percent


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over runs. Runs of a label draw are not independent, label draws are."""

    mean: float
    sd: float  # over runs
    se_runs: float  # as if all runs were independent: too small
    se_draws: float  # from the means of the label draws: the one to use


Results = Mapping[Setting, Mapping[str, Result]]


def study(
    names: Sequence[str], options: Options, done: Callable[[str, Mapping[Setting, Result]], None]
) -> Results:
    """Trains variants in their settings; calls `done` after each."""
    problems = {setting: problem(setting, options) for setting in SETTINGS}
    results: dict[Setting, dict[str, Result]] = {setting: {} for setting in SETTINGS}
    for name in names:
        found = evaluate(VARIANTS[name], problems, options)
        for setting, result in found.items():
            results[setting][name] = result
        done(name, found)
    return results


def evaluate(
    variant: Variant, problems: Mapping[Setting, Problem], options: Options
) -> dict[Setting, Result]:
    """Trains one variant in all its settings at once, and measures its accuracy in each."""
    together = stacked([problems[setting] for setting in variant.settings])
    weights = train(variant, together, options.steps, options.seed)
    found = {}
    for i, setting in enumerate(variant.settings):
        runs = slice(i * options.runs, (i + 1) * options.runs)
        own = {name: chosen(w, runs) for name, w in weights.items()}
        accuracy = {name: _accuracy(w, together, options) for name, w in own.items()}
        last = "student" if "student" in own else "learner"
        found[setting] = Result(
            weights=own[last], accuracy=accuracy[last], teacher_accuracy=accuracy.get("teacher")
        )
    return found


def train(variant: Variant, runs: Problem, steps: int, seed: int) -> dict[str, Weights]:
    """Each network's weights after the last step. Raises `NonFiniteError` if any gradient or weight
    was not finite."""
    made = algorithm(variant, runs, seed)
    skipped = torch.zeros(())
    for t in range(min(steps, variant.stop or steps)):
        metrics = train_step(made, runs.batch(t, variant.all_labels), t)
        skipped += torch.stack([metrics[f"skipped/{name}"] for name in made.learners]).sum()
    if skipped > 0 or not all(learner.finite() for learner in made.learners.values()):
        raise NonFiniteError(f"{variant.title}: a gradient or a weight is not finite")
    return {name: learner.weights() for name, learner in made.learners.items()}


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


def _accuracy(weights: Weights, runs: Problem, options: Options) -> Array:
    right = predict(weights, runs.unseen) == runs.unseen_truth.bool()  # (R, N)
    percent: Array = 100 * right.double().mean(1).numpy()
    return percent.reshape(options.draws, options.inits)


def spread(values: Array) -> Spread:
    """Of values (draws, inits)."""
    means = values.mean(1)
    return Spread(
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)),
        se_runs=float(values.std(ddof=1) / values.size**0.5),
        se_draws=float(means.std(ddof=1) / means.size**0.5),
    )


def gain(results: Mapping[str, Result], name: str) -> Spread | None:
    """Accuracy of the student or only network minus that of the baseline's, in points."""
    baseline = VARIANTS[name].baseline
    return spread(results[name].accuracy - results[baseline].accuracy) if baseline else None


def teacher_gain(results: Mapping[str, Result], name: str) -> Spread | None:
    """The same for the teacher; of a baseline without one, its only network is compared."""
    baseline, mine = VARIANTS[name].baseline, results[name].teacher_accuracy
    if baseline is None or mine is None:
        return None
    other = results[baseline].teacher_accuracy
    return spread(mine - (results[baseline].accuracy if other is None else other))
