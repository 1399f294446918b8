"""All contestants trained, and their accuracies compared run by run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpl_fast.errors import NonFiniteError
from mpl_fast.experiments.moons_contestants import CONTESTANTS, Contestant, Labeled
from mpl_fast.experiments.moons_data import (
    SETTINGS,
    Array,
    Options,
    Problem,
    Setting,
    problem,
    stacked,
)
from mpl_fast.experiments.moons_nets import Net, predict
from mpl_fast.experiments.moons_steps import Pair, batch_at, begin, step


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one contestant in one setting."""

    networks: Pair
    accuracy: Array  # (draws, inits) percent; of the student or the only network
    teacher_accuracy: Array | None  # (draws, inits) percent


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over runs. Runs of a label draw are not independent, label draws are."""

    mean: float
    sd: float  # over runs
    se_runs: float  # as if all runs were independent: too small
    se_draws: float  # from the means of the label draws: what to believe


Results = Mapping[Setting, Mapping[str, Result]]


def with_baselines(names: Sequence[str]) -> list[str]:
    """The contestants and what they are compared with, in the table's order."""
    wanted = set(names)
    while more := {CONTESTANTS[n].against for n in wanted} - wanted - {None}:
        wanted |= {name for name in more if name}
    return [name for name in CONTESTANTS if name in wanted]


def study(
    names: Sequence[str], options: Options, tell: Callable[[str, Mapping[Setting, Result]], None]
) -> Results:
    """Trains every contestant in its settings; `tell` hears of each when it is done."""
    problems = {setting: problem(setting, options) for setting in SETTINGS}
    results: dict[Setting, dict[str, Result]] = {setting: {} for setting in SETTINGS}
    for name in names:
        found = compete(CONTESTANTS[name], problems, options)
        for setting, result in found.items():
            results[setting][name] = result
        tell(name, found)
    return results


def compete(
    contestant: Contestant, problems: Mapping[Setting, Problem], options: Options
) -> dict[Setting, Result]:
    """Trains one contestant in all its settings at once."""
    both = stacked([problems[setting] for setting in contestant.settings])
    pair = train(contestant, both, options.steps)
    found = {}
    for i, setting in enumerate(contestant.settings):
        part = slice(i * options.runs, (i + 1) * options.runs)
        student = Net(*(w[part] for w in pair.student))
        teacher = Net(*(w[part] for w in pair.teacher)) if pair.teacher else None
        found[setting] = Result(
            networks=Pair(student, teacher),
            accuracy=_accuracy(student, both, options),
            teacher_accuracy=_accuracy(teacher, both, options) if teacher else None,
        )
    return found


def train(contestant: Contestant, problem: Problem, steps: int) -> Pair:
    """The networks after their last step. Raises `NonFiniteError` if a weight is not finite."""
    recipe = contestant.recipe
    if isinstance(recipe, Labeled) and recipe.stop is not None:
        steps = min(steps, recipe.stop)
    pair = begin(recipe, problem)
    for t in range(steps):
        pair = step(recipe, pair, batch_at(problem, t))
    if not all(torch.isfinite(w).all() for net in pair if net for w in net):
        raise NonFiniteError(f"{contestant.title}: a weight is not finite")
    return pair


def _accuracy(net: Net, problem: Problem, options: Options) -> Array:
    right: Tensor = predict(net, problem.unseen) == problem.unseen_truth.bool()  # (R, N)
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
    """By how much the student or only network is better than that of its baseline, in points."""
    against = CONTESTANTS[name].against
    return spread(results[name].accuracy - results[against].accuracy) if against else None


def teacher_gain(results: Mapping[str, Result], name: str) -> Spread | None:
    """The same for the teacher; a baseline without one has its only network compared."""
    against, mine = CONTESTANTS[name].against, results[name].teacher_accuracy
    if against is None or mine is None:
        return None
    theirs = results[against].teacher_accuracy
    return spread(mine - (results[against].accuracy if theirs is None else theirs))
