"""Results of the study as JSON and as Markdown tables."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tools.studies.command import versions
from tools.studies.two_moons.data import BATCH, NOISE, POINTS, Options, Setting
from tools.studies.two_moons.networks import WIDTHS
from tools.studies.two_moons.training import (
    RATE,
    Result,
    Results,
    Spread,
    gain,
    spread,
    teacher_gain,
)
from tools.studies.two_moons.variants import VARIANTS

FORMAT = "mpl_fast.two_moons/2"
HEAD = "| variant | accuracy | difference (± runs, ± draws) | to | teacher | its difference |"


def as_json(results: Results, options: Options) -> str:
    """Settings, versions and the accuracy of every run; the same seed gives the same text."""
    settings = asdict(options) | {"points": POINTS, "noise": NOISE, "batch": BATCH, "rate": RATE}
    whole = {
        "format": FORMAT,
        "settings": settings | {"network": list(WIDTHS)},
        "versions": versions("torch", "numpy", "scikit-learn"),
        "results": {
            setting: {name: _row(found, name) for name in _reported(found, options)}
            for setting, found in results.items()
        },
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
        lines += ["", f"### {setting} labels", "", HEAD, "| --- | --- | --- | --- | --- | --- |"]
        lines += [_line(found, name) for name in _reported(found, options)]
    return "\n".join(lines) + "\n"


def brief(found: Mapping[Setting, Result]) -> str:
    """One variant's accuracies on a line of progress."""
    return ", ".join(f"{name} {result.accuracy.mean():.1f} %" for name, result in found.items())


def _reported(found: Mapping[str, Result], options: Options) -> list[str]:
    """Not a variant that was to stop early but had no fewer steps than the others."""
    stops = {name: VARIANTS[name].stop for name in found}
    return [name for name, stop in stops.items() if stop is None or stop < options.steps]


def _row(found: Mapping[str, Result], name: str) -> dict[str, Any]:
    variant, result, teacher = VARIANTS[name], found[name], found[name].teacher_accuracy
    difference, teacher_difference = gain(found, name), teacher_gain(found, name)
    return {
        "title": variant.title,
        "recipe": {"algorithm": variant.recipe, "stop": variant.stop, **variant.options},
        "baseline": variant.baseline,
        "accuracy": asdict(spread(result.accuracy)),
        "difference": asdict(difference) if difference else None,
        "teacher_accuracy": asdict(spread(teacher)) if teacher is not None else None,
        "teacher_difference": asdict(teacher_difference) if teacher_difference else None,
        "runs": result.accuracy.round(2).tolist(),
        "teacher_runs": teacher.round(2).tolist() if teacher is not None else None,
    }


def _line(found: Mapping[str, Result], name: str) -> str:
    variant, result = VARIANTS[name], found[name]
    teacher = result.teacher_accuracy
    cells = [
        variant.title,
        _mean(spread(result.accuracy)),
        _signed(gain(found, name)),
        VARIANTS[variant.baseline].title if variant.baseline else "",
        _mean(spread(teacher)) if teacher is not None else "",
        _signed(teacher_gain(found, name)),
    ]
    return "| " + " | ".join(cells) + " |"


def _mean(value: Spread) -> str:
    return f"{value.mean:.1f} ± {value.sd:.1f}"


def _signed(value: Spread | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:+.2f} ± {value.se_runs:.2f} ± {value.se_draws:.2f}"
