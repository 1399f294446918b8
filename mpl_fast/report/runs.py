"""What run directories hold besides weights, and which runs differ in their seed only."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpl_fast.config import RunConfig
from mpl_fast.config.fields import all_options
from mpl_fast.errors import DataError
from mpl_fast.inference.trained import config_of
from mpl_fast.report.measures import Floats
from mpl_fast.training import curves
from mpl_fast.training.same_config import FREE_OPTIONS
from mpl_fast.untrusted import json_object

OF_A_SEED = FREE_OPTIONS | {"seed"}
POINTS = 240  # of a curve; more are averaged


@dataclass(frozen=True)
class Run:
    """Configuration, metrics and summary of a run directory."""

    path: Path
    config: RunConfig
    curves: dict[str, list[tuple[int, float]]]
    """Step and value of every metric; empty without metrics.jsonl."""
    summary: dict[str, Any]
    """Of summary.json; empty if the run has not ended."""
    environment: dict[str, Any]
    """Of env.json."""

    @property
    def name(self) -> str:
        """The folder's; of a last phase, which is always in ``RUN/finetune``, with that of RUN."""
        folder = self.path.resolve()
        last = folder.name == "finetune" and (folder.parent / "config.yaml").exists()
        return f"{folder.parent.name}/finetune" if last else folder.name

    @property
    def options(self) -> dict[str, Any]:
        """Every option by its dotted key."""
        own = {option.key: option.value for option in all_options(self.config)}
        return {"recipe": self.config.recipe, **own}

    @property
    def steps_done(self) -> int:
        """Of the last row of metrics."""
        return max((points[-1][0] for points in self.curves.values()), default=0)

    @property
    def threshold(self) -> float | None:
        """Probability above which an unlabeled image is used, if the recipe has one."""
        algorithm = self.config.algorithm
        consistency = getattr(algorithm, "consistency", algorithm)
        found: float | None = getattr(consistency, "threshold", None)
        return found

    def latest(self, metric: str) -> float | None:
        """Mean of the last tenth of the rows that have a metric."""
        points = self.curves.get(metric)
        if not points:
            return None
        return float(np.mean([v for _, v in points[-max(1, len(points) // 10) :]]))

    def mean(self, metric: str) -> float | None:
        """Mean over all rows but the first, which has the start of the run, by their duration."""
        seconds = dict(self.curves.get("train_seconds", []))
        points = self.curves.get(metric, [])
        points = points[1:] or points
        weights = [seconds.get(step, 0.0) for step, _ in points]
        return float(np.average([v for _, v in points], weights=weights)) if sum(weights) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed, their records or their hardware only."""

    name: str
    runs: tuple[Run, ...]

    def band(self, metric: str) -> tuple[Floats, Floats, Floats, Floats] | None:
        """Steps and the mean, least and greatest value over the runs, ``(P,)`` each; None if no run
        has the metric. Between rows values are interpolated."""
        drawn = [np.array(run.curves[metric], float) for run in self.runs if metric in run.curves]
        if not drawn:
            return None
        drawn = [_thinned(curve) for curve in drawn]
        first, last = max(c[0, 0] for c in drawn), min(c[-1, 0] for c in drawn)
        steps = np.unique(np.concatenate([c[:, 0] for c in drawn]))
        if inside := [step for step in steps if first <= step <= last]:
            steps = np.array(inside)
        values = np.stack([np.interp(steps, c[:, 0], c[:, 1]) for c in drawn])
        return steps, values.mean(0), values.min(0), values.max(0)


def _thinned(curve: Floats) -> Floats:
    """Means of neighbors, so that at most `POINTS` rows are left."""
    block = -(-len(curve) // POINTS)
    return np.stack([part.mean(0) for part in np.split(curve, range(block, len(curve), block))])


def read(folder: Path) -> Run:
    """Raises `DataError` for a folder without config.yaml; other files may be missing."""
    config = config_of(folder)
    try:
        drawn = curves.read(folder)
    except DataError:
        drawn = {}
    summary = curves.read_summary(folder)
    return Run(folder, config, drawn, summary, json_object(folder / "env.json"))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        key = repr([(k, v) for k, v in run.options.items() if k not in OF_A_SEED])
        by_recipe.setdefault(key, []).append(run)
    names: list[str] = []
    for members in by_recipe.values():
        name = _name(members)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [Group(n, tuple(m)) for n, m in zip(names, by_recipe.values(), strict=True)]


def _name(runs: Sequence[Run]) -> str:
    """The folder's name; of several, what their names begin with, else the recipe."""
    folders = [run.name for run in runs]
    if len(runs) == 1:
        return folders[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*folders, strict=False))
    common = "".join(letters[0] for letters in same)
    common = common.rstrip("0123456789_-./ ").removesuffix("seed")
    return common.rstrip("_-. ") or runs[0].config.recipe


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Options in which groups differ, with the value of each group ("" where it has none)."""
    options = [group.runs[0].options for group in groups]
    keys = dict.fromkeys(key for own in options for key in own if key not in OF_A_SEED)
    rows = [(key, ["" if key not in own else str(own[key]) for own in options]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
