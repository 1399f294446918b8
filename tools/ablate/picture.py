"""Learning curves of an ablation, over steps and over seconds, with bands over seeds."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.training.curves import read
from tools.ablate.running import Result

Curve = list[tuple[int, float, float]]  # step, seconds of training until then, top-1


def draw(results: Sequence[Result], out: Path) -> bool:
    """Writes a PNG of the runs that ended; without any there is nothing to draw, and it says so."""
    curves: dict[str, list[Curve]] = {}
    for result in results:
        if result.summary:
            curves.setdefault(result.job.variant.name, []).append(curve(result.job.folder))
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.0, 3.8), sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        steps, seconds, mean, spread = _over_seeds(runs)
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, mean, color=f"C{number}", label=name, marker=".")
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    axes[0].set(xlabel="step", ylabel="held-out top-1 (%)")
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    # Beside the curves: six names would cover some of them.
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    seeds = max(len(runs) for runs in curves.values())
    figure.suptitle(f"mean of {seeds} seed(s); bands are ± one standard deviation", fontsize=10)
    figure.tight_layout()
    aside = out.with_name(f".{out.name}.writing")
    figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)
    aside.rename(out)
    return True


def curve(folder: Path) -> Curve:
    """The evaluations of a run. Rows of metrics say how long their steps took; an evaluation
    between two of them is taken to lie on a straight line."""
    found = read(folder)
    spans = found.get("seconds", [])
    steps = [0, *(step for step, _ in spans)]
    clock = list(itertools.accumulate((s for _, s in spans), initial=0.0))
    return [(step, _between(step, steps, clock), top1) for step, top1 in found["eval/top1"]]


def _between(step: int, steps: Sequence[int], clock: Sequence[float]) -> float:
    for i in range(1, len(steps)):
        if step <= steps[i]:
            share = (step - steps[i - 1]) / max(1, steps[i] - steps[i - 1])
            return clock[i - 1] + share * (clock[i] - clock[i - 1])
    return clock[-1]


def _over_seeds(
    runs: Sequence[Curve],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all runs were evaluated at, mean seconds, mean and standard deviation of top-1."""
    common = sorted(set.intersection(*({step for step, _, _ in run} for run in runs)))
    at = [[next(p for p in run if p[0] == step) for run in runs] for step in common]
    seconds = [statistics.fmean(p[1] for p in points) for points in at]
    top1 = [[p[2] for p in points] for points in at]
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in top1]
    return common, seconds, [statistics.fmean(values) for values in top1], spread
