"""One figure: decision regions of a few variants, and the effect of every feedback."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tools.studies.two_moons.data import Array, Options, Problem, problem
from tools.studies.two_moons.networks import chosen, predict
from tools.studies.two_moons.training import Result, Results, Spread, gain
from tools.studies.two_moons.variants import VARIANTS

MAPS = ("labeled", "mpl_off", "mpl_difference", "mpl_exact", "smpl_difference")
BLUE, ORANGE = "#2f6db5", "#d97a1c"  # the two classes
INK, GOOD, BAD = "#4a4a4a", "#1b7f4b", "#b3261e"
X, Y = (-1.7, 2.7), (-1.75, 2.25)
CELLS = 220  # of a map, across
SHOWN = 400  # points of the cloud, so that the regions stay visible
WIDEST = 5.0  # points of accuracy that the differences' axis reaches at most, either way


def draw(results: Results, options: Options, path: Path) -> None:
    """Writes a PNG: a row for each setting, of maps and of differences.

    A map shows one label draw, that with the median accuracy of the first variant of the row:
    the color is the share of that draw's initial weights that choose a class.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    shown = {setting: found for setting, found in results.items() if found}
    names = _mapped(next(iter(shown.values())))
    figure = pyplot.figure(figsize=(15.5, 2.5 * len(shown) + 0.6), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[2.05, 1.0])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    maps = left.subplots(len(shown), len(names), squeeze=False)
    bars = right.subplots(len(shown), 1, squeeze=False)
    for row, axis, (setting, found) in zip(maps, bars[:, 0], shown.items(), strict=True):
        data = problem(setting, options)
        run = _median_draw(found[names[0]].accuracy) * options.inits
        for place, name in zip(row, names, strict=True):
            place.set_axis_off()
            if name in found:
                _map(place, found[name], data, slice(run, run + options.inits))
                place.set_title(f"{_short(name)}\n{found[name].accuracy.mean():.1f} %", fontsize=11)
        axis.set_title(f"{setting} labels: feedback minus no feedback", fontsize=11)
        _differences(axis, found)
        outside = {"transform": row[0].transAxes, "ha": "center", "va": "center", "color": INK}
        row[0].text(-0.06, 0.5, f"{setting} labels", rotation=90, fontsize=12, **outside)
    legend = (
        f"percent: mean accuracy of {options.runs} runs after {options.steps:,} steps;  map: one "
        f"label draw, shade: how many of its {options.inits} networks, line: half of them"
    )
    left.supxlabel(legend, fontsize=10, color=INK)
    right.supxlabel("points of accuracy, ± 2 standard errors over label draws", fontsize=10)
    figure.savefig(path, format="png", dpi=100, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _mapped(found: Mapping[str, Result]) -> list[str]:
    """The variants with a map: the usual ones, or the first few of another choice."""
    usual = [name for name in MAPS if name in found]
    return usual if len(usual) > 1 else list(found)[: len(MAPS)]


def _short(name: str) -> str:
    return VARIANTS[name].title.replace(" (old - new)", "")


def _median_draw(accuracy: Array) -> int:
    means = accuracy.mean(1)
    return int(means.argsort(kind="stable")[len(means) // 2])


def _map(axis: Any, result: Result, data: Problem, runs: slice) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("sides", ["#b9d0ec", "#ffffff", "#f6d3ac"])
    across = torch.linspace(*X, CELLS, dtype=torch.float64)
    up = torch.linspace(*Y, CELLS, dtype=torch.float64)
    grid = torch.cartesian_prod(up, across).flip(1)  # (CELLS * CELLS, 2), x first
    choices = predict(chosen(result.weights, runs), grid).double()
    share = choices.mean(0).reshape(CELLS, CELLS).numpy()
    axis.imshow(
        share, origin="lower", extent=(*X, *Y), cmap=colors, vmin=0, vmax=1, interpolation="nearest"
    )
    if float(share.max()) > 0.5 and float(share.min()) < 0.5:
        axis.contour(across.numpy(), up.numpy(), share, levels=[0.5], colors=[INK], linewidths=1.2)
    some = slice(None, None, max(1, len(data.points) // SHOWN))
    for label, color, marker in ((0, BLUE, "o"), (1, ORANGE, "^")):
        cloud = data.points[some][data.truth[some] == label]
        axis.scatter(*cloud.T.numpy(), s=5, color=color, alpha=0.5, linewidths=0)
        known = data.labeled[runs.start][data.labels[runs.start] == label]
        axis.scatter(
            *known.T.numpy(), s=75, marker=marker, color=color, edgecolors="black", zorder=3
        )
    axis.set(xlim=X, ylim=Y)


def _differences(axis: Any, found: Mapping[str, Result]) -> None:
    names = [name for name in found if VARIANTS[name].options.get("feedback", "off") != "off"]
    bars = [(name, bar) for name in names if (bar := gain(found, name))]
    ends = [abs(bar.mean) + 2 * bar.se_draws for _, bar in bars]
    reach = min(max([1.08 * end for end in ends], default=1.0), WIDEST) or 1.0
    axis.axvline(0, color=INK, linewidth=1)
    for place, (_, bar) in enumerate(bars):
        _bar(axis, place, bar, reach)
    axis.set_yticks(range(len(bars)), [_short(name) for name, _ in bars], fontsize=9.5)
    axis.set(xlim=(-reach, reach), ylim=(len(bars) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _bar(axis: Any, place: int, bar: Spread, reach: float) -> None:
    """Gray where zero is within two standard errors."""
    color = INK if abs(bar.mean) <= 2 * bar.se_draws else (GOOD if bar.mean > 0 else BAD)
    if abs(bar.mean) < reach:
        style = {"color": color, "capsize": 2.5, "markersize": 5}
        axis.errorbar(bar.mean, place, xerr=2 * bar.se_draws, fmt="o", **style)
    else:  # beyond the axis: an arrow at its end
        side = 1 if bar.mean > 0 else -1
        axis.plot(0.97 * side * reach, place, marker=">" if side > 0 else "<", color=color)
    text = f"{bar.mean:+.2f} ± {2 * bar.se_draws:.2f}"
    beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate(
        text, (1.0, place), xytext=(6, 0), va="center", fontsize=9.5, color=color, **beside
    )
