"""Trains every variant, and compares their accuracies run by run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mpl_fast.algorithms.base import train_step
from mpl_fast.errors import NonFiniteError
from tools.studies.two_moons.algorithm import algorithm
from tools.studies.two_moons.data import (
    SETTINGS,
    Array,
    Options,
    Problem,
    Setting,
    problem,
    stacked,
)
from tools.studies.two_moons.networks import Weights, chosen, predict
from tools.studies.two_moons.variants import VARIANTS, Variant


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
    names: Sequence[str], options: Options, show: Callable[[str], object] = lambda line: None
) -> Results:
    """Trains variants in their settings; shows a line for each."""
    began = time.perf_counter()
    problems = {setting: problem(setting, options) for setting in SETTINGS}
    results: dict[Setting, dict[str, Result]] = {setting: {} for setting in SETTINGS}
    for number, name in enumerate(names, 1):
        found = evaluate(VARIANTS[name], problems, options)
        for setting, result in found.items():
            results[setting][name] = result
        means = ", ".join(f"{s} {result.accuracy.mean():.1f} %" for s, result in found.items())
        head = f"{number:2d}/{len(names)} {time.perf_counter() - began:5.0f} s"
        show(f"{head}  {VARIANTS[name].title}: {means}")
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
