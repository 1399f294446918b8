"""Learning curves of an ablation over steps and over seconds, with bands over seeds."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpl_fast.atomic import atomic_path
from mpl_fast.training.curves import read
from tools.studies.ablation.run import Result

Curve = dict[int, tuple[float, float]]  # by step: seconds of training until then, top-1


def draw(results: Sequence[Result], out: Path) -> bool:
    """Writes a PNG of the runs that ended; returns False if there are none."""
    curves: dict[str, list[Curve]] = {}
    for result in results:
        if result.summary:
            curves.setdefault(result.job.variant.name, []).append(curve(result.job.folder))
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a variant's name is no formula
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.0, 3.8), sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        steps = sorted(set.intersection(*(set(run) for run in runs)))  # that all were evaluated at
        values = np.array([[run[step] for step in steps] for run in runs])  # (seeds, steps, 2)
        seconds, top1 = values.mean(0).T
        sd = values[..., 1].std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, top1, color=f"C{number}", label=name, marker=".")
            axis.fill_between(x, top1 - sd, top1 + sd, color=f"C{number}", alpha=0.15, linewidth=0)
    axes[0].set(xlabel="step", ylabel="held-out top-1 (%)")
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    # Beside the curves: six names would cover some of them.
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    seeds = max(len(runs) for runs in curves.values())
    figure.suptitle(title(seeds), fontsize=10)
    figure.tight_layout()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    return True


def title(seeds: int) -> str:
    """Of the picture."""
    return f"mean of {seeds} seeds; bands are ± one standard deviation" if seeds > 1 else "one seed"


def curve(folder: Path) -> Curve:
    """The evaluations of a run. Rows of metrics have the seconds of their steps; the time of an
    evaluation between two rows is interpolated."""
    metrics = read(folder)
    spans = metrics.get("train_seconds", [])
    ends = [0, *(step for step, _ in spans)]
    clock = list(itertools.accumulate((s for _, s in spans), initial=0.0))
    return {
        step: (float(np.interp(step, ends, clock)), top1) for step, top1 in metrics["eval/top1"]
    }
