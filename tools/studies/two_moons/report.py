"""Results of the study as JSON and as Markdown tables."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tools.studies.command import table, versions
from tools.studies.two_moons.algorithm import RATE
from tools.studies.two_moons.data import BATCH, NOISE, POINTS, Options
from tools.studies.two_moons.networks import WIDTHS
from tools.studies.two_moons.training import (
    Result,
    Results,
    gain,
    spread,
    teacher_gain,
)
from tools.studies.two_moons.variants import VARIANTS

FORMAT = "mpl_fast.two_moons/2"
HEAD = "variant", "accuracy", "difference (± runs, ± draws)", "to", "teacher", "its difference"


def as_json(results: Results, options: Options) -> str:
    """Settings, versions and the accuracy of every run; the same seed gives the same text."""
    settings = asdict(options) | {"points": POINTS, "noise": NOISE, "batch": BATCH, "rate": RATE}
    whole = {
        "format": FORMAT,
        "settings": settings | {"network": list(WIDTHS)},
        "versions": versions("torch", "numpy", "scikit-learn"),
        "results": {setting: _rows(found, options) for setting, found in results.items()},
    }
    return json.dumps(whole, indent=1) + "\n"


def as_markdown(results: Results, options: Options) -> str:
    """A table for each setting."""
    lines = [
        f"{options.draws} label draws x {options.inits} initial weights = {options.runs} runs, "
        f"labels {options.labels}, {options.steps} steps, seed {options.seed}. Accuracy in percent "
        f"on {POINTS} unseen points, mean ± standard deviation over runs. Differences in points, "
        "paired run by run, ± standard error over runs ± that over the means of the label draws, "
        "which is the one to use."
    ]
    for setting, found in results.items():
        rows = _rows(found, options).values()
        lines += ["", f"### {setting} labels", "", *table(HEAD, map(_cells, rows))]
    return "\n".join(lines) + "\n"


def _rows(found: Mapping[str, Result], options: Options) -> dict[str, dict[str, Any]]:
    """By variant, without those that were to stop early but had no fewer steps than the others."""
    stops = {name: VARIANTS[name].stop for name in found}
    return {
        name: _row(found, name)
        for name, stop in stops.items()
        if stop is None or stop < options.steps
    }


def _row(found: Mapping[str, Result], name: str) -> dict[str, Any]:
    variant, result, teacher = VARIANTS[name], found[name], found[name].teacher_accuracy
    spreads = {
        "accuracy": spread(result.accuracy),
        "difference": gain(found, name),
        "teacher_accuracy": None if teacher is None else spread(teacher),
        "teacher_difference": teacher_gain(found, name),
    }
    return {
        "title": variant.title,
        "recipe": {"algorithm": variant.recipe, "stop": variant.stop, **variant.options},
        "baseline": variant.baseline,
        **{key: asdict(value) if value else None for key, value in spreads.items()},
        "runs": result.accuracy.round(2).tolist(),
        "teacher_runs": None if teacher is None else teacher.round(2).tolist(),
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    mean = "{mean:.1f} ± {sd:.1f}"
    signed = "{mean:+.2f} ± {se_runs:.2f} ± {se_draws:.2f}"
    accuracy, difference, teacher, teacher_difference = (
        form.format(**row[key]) if row[key] else ""
        for key, form in (
            ("accuracy", mean),
            ("difference", signed),
            ("teacher_accuracy", mean),
            ("teacher_difference", signed),
        )
    )
    to = VARIANTS[row["baseline"]].title if row["baseline"] else ""
    return [row["title"], accuracy, difference, to, teacher, teacher_difference]
