"""What a sweep leaves: the best config, a table of all trials, and Optuna's figures."""

import csv
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from mpl_fast.atomic import atomic_path, write_text
from mpl_fast.first_few import counted
from mpl_fast.sweep.ranges import shown

BEST = 5
TOP1 = "held-out top-1 (%)"


def best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials from the best on; among equal ones the earliest is first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-_top1(trial), trial.number))


def write_csv(file: Path, trials: Sequence[FrozenTrial], keys: Sequence[str]) -> None:
    """A line for each trial: its result, time, reason and values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "top1", "last_step", "train_seconds", "reason", *keys])
    for trial in trials:
        attributes = trial.user_attrs
        writer.writerow(
            [
                trial.number,
                trial.state.name.lower(),
                "" if trial.value is None else trial.value,
                "" if trial.last_step is None else trial.last_step,
                attributes.get("train_seconds", ""),
                attributes.get("reason", ""),
                *(trial.params.get(key, "") for key in keys),
            ]
        )
    write_text(file, text.getvalue())


def table(trials: Sequence[FrozenTrial], keys: Sequence[str], held_out: int) -> str:
    """Markdown of the best trials and the first one, and the standard error of their difference."""
    best = best_first(trials)
    lines = [
        f"| trial | top-1 (%) | seconds of training | {' | '.join(keys)} |",
        "| --- " * (3 + len(keys)) + "|",
    ]
    # Also the first one, which has the config's own values.
    for trial in [*best[:BEST], *(trial for trial in best[BEST:] if trial.number == 0)]:
        values = (shown({key: trial.params[key]}).removeprefix(f"{key} ") for key in keys)
        seconds = trial.user_attrs.get("train_seconds", 0.0)
        cells = (f"{trial.number}", f"{_top1(trial):.2f}", f"{seconds:.0f}", *values)
        lines.append(f"| {' | '.join(cells)} |")
    states = [trial.state for trial in trials]
    counts = [
        counted(len(best), "complete trial"),
        f"{states.count(TrialState.PRUNED)} pruned",
        f"{states.count(TrialState.FAIL)} failed",
    ]
    lines += ["", f"{', '.join(counts)}. {noise(best, held_out)}"]
    return "\n".join(lines)


def noise(best: Sequence[FrozenTrial], held_out: int) -> str:
    """The standard error of the best top-1, and how many trials are within it."""
    share = _top1(best[0]) / 100
    # Not 0 at a top-1 of 100 %: Laplace's rule of succession.
    share = (share * held_out + 1) / (held_out + 2)
    error = 100 * (share * (1 - share) / held_out) ** 0.5
    near = sum(_top1(trial) >= _top1(best[0]) - error for trial in best)
    return (
        f"The standard error of a top-1 over {counted(held_out, 'held-out image')} is about "
        f"{error:.1f} points: {counted(near, 'trial is', 'trials are')} within it of the best, and "
        "the best one's own top-1 is optimistic, since it was chosen by it."
    )


def draw_figures(study: optuna.Study, folder: Path) -> list[Path]:
    """Optuna's figures as PNG; without those that a study of so few trials cannot have."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    drawn = []
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an axis with one value, and that this is experimental
        for name, plot in (
            ("optimization_history", partial(plots.plot_optimization_history, target_name=TOP1)),
            ("param_importances", plots.plot_param_importances),
            ("slice", partial(plots.plot_slice, target_name=TOP1)),
            ("parallel_coordinate", partial(plots.plot_parallel_coordinate, target_name=TOP1)),
            ("intermediate_values", plots.plot_intermediate_values),
        ):
            try:
                plot(study)
            except (ValueError, RuntimeError):  # importances need trials that differ
                continue
            with atomic_path(folder / f"{name}.png") as temporary:
                pyplot.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
            drawn.append(folder / f"{name}.png")
    pyplot.close("all")
    return drawn


def _top1(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
