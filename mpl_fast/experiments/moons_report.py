"""The study as files: numbers (JSON), a table (Markdown) and a figure, all of them or none."""

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mpl_fast
from mpl_fast.errors import output_errors
from mpl_fast.experiments.moons_contestants import CONTESTANTS
from mpl_fast.experiments.moons_data import BATCH, NOISE, POINTS, Options, Setting
from mpl_fast.experiments.moons_nets import WIDTHS
from mpl_fast.experiments.moons_steps import RATE
from mpl_fast.experiments.moons_study import Result, Results, Spread, gain, spread, teacher_gain

FORMAT = "mpl_fast.two_moons/1"
HEAD = "| contestant | accuracy | difference (± runs, ± draws) | to | teacher | its difference |"


def write(out: Path, writers: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Writes every file aside, and only when all are whole gives them their names."""
    asides = {
        out / name: out / f".{Path(name).stem}.writing{Path(name).suffix}" for name in writers
    }
    with output_errors(out):
        try:
            for name, writer in writers.items():
                aside = asides[out / name]
                writer(aside)
                with aside.open("rb+") as file:
                    os.fsync(file.fileno())
            for final, aside in asides.items():
                aside.replace(final)
        finally:
            for aside in asides.values():
                aside.unlink(missing_ok=True)
    return list(asides)


def as_json(results: Results, options: Options) -> str:
    """Everything that the table and another analysis need; the same seed gives the same text."""
    settings = asdict(options) | {
        "points": POINTS,
        "noise": NOISE,
        "batch": BATCH,
        "rate": RATE,
        "network": list(WIDTHS),
    }
    rows = {
        setting: {name: _row(found, name) for name in _reported(found, options)}
        for setting, found in results.items()
    }
    whole = {"format": FORMAT, "settings": settings, "versions": _versions(), "results": rows}
    return json.dumps(whole, indent=1) + "\n"


def as_markdown(results: Results, options: Options) -> str:
    """A table for each setting."""
    lines = [
        f"{options.draws} label draws x {options.inits} initial weights = {options.runs} runs, "
        f"labels {options.labels}, {options.steps} steps, seed {options.seed}. Accuracy in percent "
        f"on {POINTS} unseen points, mean ± standard deviation over runs. Differences in points, "
        "paired run by run, ± standard error over runs ± that over the means of the label draws, "
        "which is the one to believe."
    ]
    for setting, found in results.items():
        lines += ["", f"### {setting} labels", "", HEAD, "| --- | --- | --- | --- | --- | --- |"]
        lines += [_line(found, name) for name in _reported(found, options)]
    return "\n".join(lines) + "\n"


def _reported(found: Mapping[str, Result], options: Options) -> list[str]:
    """Not who was to stop earlier than the others and did not: that would be a row twice."""
    stops = {name: getattr(CONTESTANTS[name].recipe, "stop", None) for name in found}
    return [name for name, stop in stops.items() if stop is None or stop < options.steps]


def _row(found: Mapping[str, Result], name: str) -> dict[str, Any]:
    contestant, result = CONTESTANTS[name], found[name]
    better, taught = gain(found, name), teacher_gain(found, name)
    teacher = result.teacher_accuracy
    return {
        "title": contestant.title,
        "recipe": {"algorithm": type(contestant.recipe).__name__} | asdict(contestant.recipe),
        "against": contestant.against,
        "accuracy": asdict(spread(result.accuracy)),
        "difference": asdict(better) if better else None,
        "teacher_accuracy": asdict(spread(teacher)) if teacher is not None else None,
        "teacher_difference": asdict(taught) if taught else None,
        "runs": result.accuracy.round(2).tolist(),
        "teacher_runs": teacher.round(2).tolist() if teacher is not None else None,
    }


def _line(found: Mapping[str, Result], name: str) -> str:
    contestant, result = CONTESTANTS[name], found[name]
    teacher = result.teacher_accuracy
    cells = [
        contestant.title,
        _mean(spread(result.accuracy)),
        _signed(gain(found, name)),
        CONTESTANTS[contestant.against].title if contestant.against else "",
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


def _versions() -> dict[str, str]:
    import numpy
    import sklearn
    import torch

    return {
        "mpl_fast": mpl_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


def brief(found: Mapping[Setting, Result]) -> str:
    """One contestant's accuracies on a line of progress."""
    return ", ".join(f"{name} {result.accuracy.mean():.1f} %" for name, result in found.items())
