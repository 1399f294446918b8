"""The figures of a report, by matplotlib; the page and the files for papers have the same ones."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from mpl_fast.errors import output_errors
from mpl_fast.report.measures import Bins, ClassAccuracy, Floats, Ints, wilson
from mpl_fast.report.names import all_shown, shown
from mpl_fast.report.runs import Group

# On the page each of these is a CSS variable, which has another value on a dark screen.
INK, MUTED, GRID, SURFACE = "#1a1d21", "#59636e", "#d9dee4", "#fefefe"
# Okabe and Ito's colors, and two more for the ninth and tenth class.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7",
)  # fmt: skip
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, "#8c6d1f", "#7b5ea7", "#888e95", "#4d3b2f")
VARIABLES = (INK, MUTED, GRID, SURFACE, *COLORS)
DASHES = ("-", "--", ":", "-.")
NAME = 22  # characters of a class name in a figure
WIDTH = 4.5  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "pdf.fonttype": 42, "text.parse_math": False, "font.size": 9,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 10, "axes.linewidth": 0.7,
    "lines.linewidth": 1.6, "legend.fontsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A figure with its file name, its title, and a sentence for those who do not see it."""

    name: str
    title: str
    text: str
    figure: Figure
    wide: bool = False
    """Takes the whole width of the page."""

    def svg(self) -> str:
        """An ``<svg>`` element for a page: text as text, colors as CSS variables, ids of its own,
        nothing that is loaded."""
        out = io.StringIO()
        none: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", metadata=none, transparent=True)
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' (?:id="[a-zA-Z0-9.]+_\d+"|width="[\d.]+pt"|height="[\d.]+pt")', "", text)
        for place, color in enumerate(VARIABLES):
            text = text.replace(color, f"var(--c{place})")
        return re.sub(r"\s*\n\s*", "\n", text)


@contextmanager
def _axes(width: float = WIDTH, height: float = 3.0) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def save(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Writes NAME.png and NAME.pdf of each chart, with its title; returns the paths."""
    written = []
    for chart in charts:
        with matplotlib.rc_context(STYLE):
            if not chart.figure.get_suptitle():
                chart.figure.suptitle(chart.title, fontsize=10.5)
            for kind in ("png", "pdf"):
                file = folder / f"{chart.name}.{kind}"
                with output_errors(file):
                    # Dates are left out, so that equal figures are equal files.
                    about: dict[str, Any] = {"CreationDate": None} if kind == "pdf" else {}
                    chart.figure.savefig(file, dpi=200, facecolor="white", metadata=about)
                written.append(file)
    return written


def curve(groups: Sequence[Group], metric: str, title: str, *, factor: float = 1.0) -> Chart | None:
    """A line for each group, and a band from the least to the greatest of its runs; None if no run
    has the metric."""
    bands = [(group, band) for group in groups if (band := group.band(metric)) is not None]
    if not bands:
        return None
    last: list[str] = []
    names = all_shown([group.name for group, _ in bands], 40)
    columns = 1 if max(map(len, names)) > 24 else 2
    rows = -(-len(names) // columns) if len(groups) > 1 else 0
    with _axes(height=2.7 + 0.19 * rows) as (figure, axes):
        for label, (group, (steps, mean, least, most)) in zip(names, bands, strict=True):
            place = [*groups].index(group)
            color, line = COLORS[place % len(COLORS)], DASHES[place // len(COLORS) % len(DASHES)]
            mark = "o" if len(steps) < 12 else ""
            # Matplotlib leaves names that begin with _ out of legends: thus the space.
            own: dict[str, Any] = {"color": color, "label": f" {label}", "marker": mark}
            axes.plot(steps, factor * mean, line, ms=3, **own)
            if len(group.runs) > 1:
                axes.fill_between(
                    steps, factor * least, factor * most, color=color, alpha=0.2, linewidth=0
                )
            last.append(f"{f'{label} ' * (len(groups) > 1)}{factor * mean[-1]:.4g}")
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        if "%" in title:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -1), min(high, 101))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_steps))
        if len(groups) > 1:
            figure.legend(ncols=columns, loc="outside upper left", handlelength=1.6)
    text = f"At the end: {', '.join(last)}."
    return Chart(f"curve_{re.sub('[^a-z0-9]+', '_', metric.lower())}", title, text, figure)


def _steps(value: float, _: object) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def confusion_matrix(
    matrix: Ints, order: Ints, names: Sequence[str], title: str, name: str
) -> Chart:
    """Shares of each true class of the classes in `order`; mistakes in another color than hits."""
    part = matrix[np.ix_(order, order)]
    rate = part / np.maximum(matrix[order].sum(1, keepdims=True), 1)
    size, labels = len(order), all_shown([names[label] for label in order], NAME)
    few = size <= 12
    side = max(4.6, 1.5 + size * (0.36 if few else 0.215))
    with _axes(side, side * 0.94) as (figure, axes):
        for row, column in zip(*np.nonzero(part), strict=True):
            share, hit = rate[row, column], row == column
            # Opacity and not lightness: ink on it can be read on light and dark pages.
            color, alpha = (
                BLUE if hit else VERMILLION,
                0.62 * min(1.0, share ** (1 if hit else 0.5)),
            )
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=alpha, linewidth=0)
            )
            if few or (not hit and share >= 0.08):
                text = f"{100 * share:.0f}" if share >= 0.005 else ""
                axes.text(column, row, text, ha="center", va="center", fontsize=8 if few else 6)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        short = max(map(len, labels)) <= 3
        axes.set_xticks(range(size), labels, rotation=0 if short else 45 if few else 90)
        for label in axes.get_xticklabels() if few and not short else ():
            label.set(ha="right", rotation_mode="anchor")
        axes.grid(False)
        axes.set_yticks(range(size), labels)
        axes.tick_params(length=0, labelsize=8.5 if few else 7.5)
        axes.set(xlabel="predicted", ylabel="true class")
    text = f"Confusion matrix of {size} classes, in % of each true class (row). "
    full = matrix[order].any(1)
    text += f"Mean of the diagonal: {100 * np.diag(rate)[full].mean():.1f} %." if full.any() else ""
    return Chart(name, title, text, figure, wide=True)


def confusion_overview(matrix: Ints, order: Ints, window: tuple[int, int]) -> Chart:
    """All mistakes of many classes, pooled to at most 200 x 200 cells; a frame around a window."""
    wrong = matrix[np.ix_(order, order)].astype(np.float64)
    np.fill_diagonal(wrong, 0)
    classes = len(wrong)
    starts = np.arange(0, classes, -(-classes // 200))
    pooled = np.add.reduceat(np.add.reduceat(wrong, starts, 0), starts, 1)
    # The largest tenth of a percent would leave all others pale.
    strength = np.sqrt(np.clip(pooled / max(np.quantile(pooled, 0.999), 1), 0, 1))
    red, green, blue = (int(VERMILLION[i : i + 2], 16) for i in (1, 3, 5))
    pixels = np.empty((*pooled.shape, 4), np.uint8)
    pixels[:] = (red, green, blue, 0)
    pixels[..., 3] = np.rint(255 * strength)
    first, end = window
    with _axes(4.6, 4.4) as (figure, axes):
        extent = (0, classes, classes, 0)
        axes.imshow(pixels, extent=extent, interpolation="nearest")
        frame: dict[str, Any] = {"fill": False, "edgecolor": BLUE, "linewidth": 1.4}
        axes.add_patch(Rectangle((first, first), end - first, end - first, **frame))
        axes.grid(False)
        axes.set(xlabel="predicted (classes in order of confusion)", ylabel="true class")
    text = f"Mistakes among all {classes:,} classes, ordered so that confused ones are neighbors; "
    text += f"the frame holds the {end - first} of the next figure."
    return Chart("confusion_all", f"Mistakes among all {classes:,} classes", text, figure)


def class_dots(
    accuracy: ClassAccuracy, chosen: Sequence[int], names: Sequence[str], title: str, name: str
) -> Chart:
    """Accuracy of each of the `chosen` classes with its 95 % interval, and its precision."""
    rows = np.arange(len(chosen))
    hits = [accuracy.recall[c] * accuracy.images[c] for c in chosen]
    ends = [wilson(h, accuracy.images[c]) for h, c in zip(hits, chosen, strict=True)]
    with _axes(height=1.0 + 0.21 * len(chosen)) as (figure, axes):
        axes.hlines(rows, *100 * np.array(ends).T, color=BLUE, alpha=0.45, linewidth=3)
        axes.plot(100 * accuracy.recall[chosen], rows, "o", color=BLUE, ms=5, label="accuracy")
        precision: dict[str, Any] = {
            "color": VERMILLION,
            "ms": 5,
            "mfc": "none",
            "label": "precision",
        }
        axes.plot(100 * accuracy.precision[chosen], rows, "D", **precision)
        axes.set_yticks(rows, all_shown([names[c] for c in chosen], NAME))
        axes.set(xlabel="%", ylim=(len(chosen) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=2)
    worst, best = chosen[0], chosen[-1]
    text = f"From {shown(names[worst], NAME)} with {100 * accuracy.recall[worst]:.1f} % to "
    text += f"{shown(names[best], NAME)} with {100 * accuracy.recall[best]:.1f} %; "
    text += "bars: 95 % intervals."
    return Chart(name, title, text, figure)


def class_histogram(accuracy: ClassAccuracy) -> Chart:
    """How many classes have which accuracy."""
    values = 100 * accuracy.recall[accuracy.images > 0]
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    with _axes() as (figure, axes):
        axes.hist(values, bins=[*np.linspace(0, 100, 26)], color=BLUE, alpha=0.75)
        axes.axvline(middle, color=VERMILLION, linestyle="--", label=f"median {middle:.1f} %")
        axes.set(xlabel="accuracy of the class (%)", ylabel="classes")
        axes.legend()
    text = f"Of {len(values):,} classes, the median is {middle:.1f} %, a tenth is below {low:.1f} "
    text += f"%, and a tenth above {high:.1f} %."
    return Chart("class_histogram", "Accuracy by class", text, figure)


def reliability(found: Bins) -> Chart:
    """Accuracy of the predictions in each bin of confidence, and how many they are."""
    edges = np.linspace(0, 1, len(found.images) + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] * 0.9
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        full = found.images > 0
        upper.plot((0, 1), (0, 1), color=MUTED, linestyle="--", linewidth=1, label="calibrated")
        upper.bar(middle, found.accuracy, width, color=BLUE, alpha=0.75, label="accuracy")
        ends = (middle - width / 2)[full], (middle + width / 2)[full]
        line: dict[str, Any] = {"color": VERMILLION, "linewidth": 2, "label": "mean confidence"}
        upper.hlines(found.confidence[full], *ends, **line)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        upper.legend(loc="upper left")
        lower.bar(middle, found.images / found.images.sum(), width, color=MUTED, alpha=0.6)
        lower.set(xlabel="probability of the class predicted", ylabel="share")
    text = f"Expected calibration error {100 * found.ece:.2f} % in {len(found.images)} bins."
    return Chart("reliability", "Reliability diagram", text, figure)


def thresholds(
    confidence: Floats, hits: NDArray[np.bool_], used: float | None
) -> tuple[Chart, list[tuple[float, float, float]]]:
    """Accuracy of the images above a threshold by their share, and some rows of it: threshold,
    share, accuracy. `used`: the recipe's threshold."""
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)
    accuracy = hits[order].cumsum() / count
    rows = []
    for threshold in sorted({0.5, 0.8, 0.9, 0.95, 0.99, *([used] if used else [])}):
        above = int((confidence >= threshold).sum())
        rows.append(
            (threshold, above / len(order), float(accuracy[above - 1]) if above else np.nan)
        )
    drawn = np.unique(np.linspace(max(0, min(19, len(order) - 1)), len(order) - 1, 200).astype(int))
    rows_drawn = [row for row in rows if row[1] * len(order) >= min(20, len(order))]
    with _axes() as (figure, axes):
        axes.plot(100 * count[drawn] / len(order), 100 * accuracy[drawn], color=BLUE)
        for threshold, share, right in rows_drawn:
            mine = threshold == used
            color = VERMILLION if mine else BLUE
            axes.plot(
                100 * share, 100 * right, "D" if mine else "o", color=color, ms=6 if mine else 4
            )
            where: dict[str, Any] = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{threshold:g}", (100 * share, 100 * right), **where)
        axes.set(xlabel="images that reach the threshold (%)", ylabel="of these right (%)")
        axes.margins(y=0.15)
    known = [f"{t:g}: {100 * s:.1f} % kept, {100 * a:.1f} % right" for t, s, a in rows if s]
    text = f"Unlabeled images above a threshold; {'; '.join(known)}."
    return Chart("thresholds", "Pseudo labels by threshold", text, figure), rows


def pseudo_by_class(
    share: Floats,
    accuracy: Floats,
    chosen: Sequence[int],
    names: Sequence[str],
    threshold: float,
) -> Chart:
    """Of each class: share of its unlabeled images above the threshold, and of these right, NaN
    where there is none above."""
    rows = np.arange(len(chosen))
    with _axes(height=1.0 + 0.26 * len(chosen)) as (figure, axes):
        axes.barh(rows - 0.19, 100 * share[chosen], 0.36, color=SKY, label="of the class, above")
        axes.barh(rows + 0.19, 100 * accuracy[chosen], 0.36, color=BLUE, label="of these right")
        axes.set_yticks(rows, all_shown([names[c] for c in chosen], NAME))
        axes.set(xlabel="%", ylim=(len(chosen) - 0.5, -0.5))
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=2)
    ends = (
        f"{shown(names[c], NAME)} ({100 * share[c]:.0f} % above"
        + (f", {100 * accuracy[c]:.0f} % of these right)" if share[c] else ")")
        for c in (chosen[0], chosen[-1])
    )
    text = (
        "Shares of the unlabeled images of a true class above the threshold, and of these right; "
    )
    text += f"the least first: from {' to '.join(ends)}."
    title = f"Pseudo labels by class (probability from {threshold:.3g})"
    return Chart("pseudo_by_class", title, text, figure)


def feature_map(
    points: Floats, labels: Ints, guesses: Ints, names: Sequence[str], *, unlabeled: Ints
) -> tuple[Chart, Floats]:
    """The 2-D map, and its points in units of the SVG, (M, 2).

    Colors are those of the true class, or, of the images numbered in `unlabeled`, of the class
    predicted; with more than ten classes they mean right, wrong and unlabeled.
    """
    own = np.zeros(len(points), bool)
    own[unlabeled] = True
    wrong = ~own & (labels != guesses)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6), dpi=72)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.93))
        if len(names) <= len(COLORS):
            kinds = np.where(own, guesses, labels)
            for label in range(len(names)):
                mine = kinds == label
                color = COLORS[label]
                axes.plot(*points[mine & ~own].T, "o", color=color, ms=3.6, mew=0, alpha=0.8)
                axes.plot(*points[mine & own].T, "+", color=color, ms=5, mew=0.9, alpha=0.8)
        else:
            axes.plot(*points[~own & ~wrong].T, "o", color=BLUE, ms=3.6, mew=0, alpha=0.8)
            axes.plot(*points[own].T, "+", color=GREEN, ms=5, mew=0.9, alpha=0.8)
        ring: dict[str, Any] = {
            "color": VERMILLION if len(names) > len(COLORS) else INK,
            "mfc": "none",
        }
        axes.plot(*points[wrong].T, "o", **ring, ms=5.4, mew=0.6, alpha=0.55, label="wrong")
        for label in range(len(names) if len(names) <= len(COLORS) else 0):
            mine = (labels == label) & ~own
            if mine.any():
                box: dict[str, Any] = {
                    "facecolor": SURFACE,
                    "edgecolor": COLORS[label],
                    "pad": 2,
                    "alpha": 0.85,
                }
                x, y = np.median(points[mine], 0)
                axes.text(x, y, shown(names[label], 16), ha="center", va="center", bbox=box)
        known = "right" if len(names) > len(COLORS) else "validation image (color: true class)"
        axes.plot(
            [], [], "o", color=MUTED if len(names) <= len(COLORS) else BLUE, ms=4, label=known
        )
        if len(unlabeled):
            color = MUTED if len(names) <= len(COLORS) else GREEN
            what = (
                "unlabeled (color: class predicted)" if len(names) <= len(COLORS) else "unlabeled"
            )
            axes.plot([], [], "+", color=color, ms=6, label=what)
        figure.legend(loc="upper center", ncols=3, handletextpad=0.2, borderaxespad=0.1)
        # Set and not left to autoscaling, which waits until the figure is drawn.
        (left, bottom), (right, top) = points.min(0), points.max(0)
        x, y = 0.03 * (right - left), 0.03 * (top - bottom)
        axes.set(xlim=(left - x, right + x), ylim=(bottom - y, top + y), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        placed = axes.transData.transform(points)
        placed[:, 1] = figure.bbox.height - placed[:, 1]
    text = f"t-SNE of the features of {int((~own).sum()):,} validation images"
    text += f" and {len(unlabeled):,} unlabeled ones" if len(unlabeled) else ""
    title = "Map of the features"
    return Chart(
        "feature_map", title, f"{text}; near points have similar features.", figure
    ), placed


def picture_grid(
    name: str, title: str, tiles: Sequence[tuple[Image.Image, str]], columns: int
) -> Chart:
    """Pictures with a line of text below each; for files, since the page has them as pictures."""
    rows = -(-len(tiles) // columns)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(1.15 * columns, 1.4 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, (picture, text) in zip(figure.axes, tiles, strict=False):
            axes.imshow(picture)
            axes.set_title(text, fontsize=6.5, y=-0.02, va="top")
    return Chart(name, title, title, figure)
