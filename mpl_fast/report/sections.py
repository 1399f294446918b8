"""The content of each section of a report, but those of pictures: numbers, tables and charts."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpl_fast.config import RunConfig
from mpl_fast.config.fields import all_options
from mpl_fast.errors import UserError
from mpl_fast.first_few import counted, first_few
from mpl_fast.report import figures, measures, page
from mpl_fast.report.figures import Chart
from mpl_fast.report.names import all_shown, shown
from mpl_fast.report.page import Table
from mpl_fast.report.predictions import GUESSES, Network, Predictions
from mpl_fast.report.runs import Group, Run, differences
from mpl_fast.report.verdict import percent
from mpl_fast.training.console import duration

FEW_CLASSES = 40  # of which each has a row of its own
BLOCK = 30  # classes of the confusion matrix of many
WORST = 20
NAME = 60  # characters of a class name in a table
NONE = "-"  # in a cell without a value
CURVES = {
    "eval/top1": ("Validation top-1 (%)", 1.0),
    "eval/top5": ("Validation top-5 (%)", 1.0),
    "loss/labeled": ("Loss on labeled images", 1.0),
    "loss/consistency": ("Consistency loss", 1.0),
    "loss/student": ("Loss of the student", 1.0),
    "feedback": ("Feedback of the student", 1.0),
}
PSEUDO_CURVES = {
    "mask_rate": ("Unlabeled above the threshold (%)", 100.0),
    "accuracy/pseudo": ("Accuracy of the pseudo labels (%)", 100.0),
    "confidence": ("Confidence of the pseudo labels (%)", 100.0),
}
SPEED_CURVES = {
    "images_per_second": ("Images per second", 1.0),
    "data_wait": ("Data wait (% of training time)", 100.0),
}
T = TypeVar("T")


@dataclass
class Detail:
    """The run that is shown in detail, and what of it could not be computed."""

    group: Group
    run: Run
    network: Network | None = None
    val: Predictions | None = None
    labeled: Predictions | None = None
    unlabeled: Predictions | None = None
    gone: dict[str, str] = field(default_factory=dict)
    """Why a section is missing, by its name."""
    charts: list[Chart] = field(default_factory=list)
    """All that are drawn, for files."""

    @property
    def has_top5(self) -> bool:
        """Whether five guesses can be wrong: there are more than five classes."""
        return self.network is None or self.val is None or len(self.network.classes) > GUESSES

    def attempt(self, sections: Sequence[str], compute: Callable[[], T]) -> T | None:
        """The result, or None and the error as the reason why `sections` are missing."""
        try:
            return compute()
        except UserError as error:
            self.gone |= dict.fromkeys(sections, shown(str(error)))
            return None

    def drawn(self, chart: Chart | None) -> list[page.Drawn]:
        """For the template; also kept for files."""
        if chart is None:
            return []
        self.charts.append(chart)
        return [page.drawn(chart)]


def subtitle(detail: Detail, several: bool) -> str:
    """The line below the title."""
    run, network = detail.run, detail.network
    step = network.step if network else run.steps_done
    parts = [
        f"recipe {run.config.recipe}",
        f"network {run.config.model.name}",
        f"step {step:,} of {run.config.steps:,}",
    ]
    if detail.val is not None:
        parts.append(f"{len(detail.val.labels):,} validation images")
    if detail.network is not None and detail.val is not None:
        parts.append(counted(len(detail.network.classes), "class", "classes"))
    if time_ := run.environment.get("time"):
        parts.append(f"trained {str(time_)[:10]}")
    text = " · ".join(parts)
    return f"In detail: {shown(run.name)} · {text}" if several else text


def tiles(detail: Detail) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top."""
    run, val, tiles = detail.run, detail.val, list[tuple[str, str, str]]()
    if val is not None:
        for name, hits in (("Top-1", val.hits), ("Top-5", val.top5)):
            if name == "Top-5" and not detail.has_top5:
                continue
            low, high = measures.wilson(hits.sum(), len(hits))
            interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
            tiles.append((name, percent(float(hits.mean()), 2), interval))
    elif last := run.curves.get("eval/top1"):
        tiles.append(("Top-1", f"{last[-1][1]:.2f} %", f"logged at step {last[-1][0]:,}"))
    if points := run.curves.get("eval/top1"):
        step, best = max(points, key=lambda point: point[1])
        tiles.append(("Best evaluation", f"{best:.2f} %", f"step {step:,} of {run.steps_done:,}"))
    if val is not None:
        found = measures.bins(val.confidence, val.hits)
        scores = f"NLL {val.nll.mean():.3f}, Brier score {val.brier:.3f}"
        tiles.append(("Calibration error (ECE)", percent(found.ece), scores))
    if detail.labeled is not None:
        right = percent(float(detail.labeled.hits.mean()))
        count = f"{len(detail.labeled.labels):,} labeled training images"
        tiles.append(("Training top-1", right, f"of {count}"))
    if (share := run.latest("mask_rate")) is not None:
        tiles.append(("Unlabeled above threshold", percent(share), "in the last tenth of the log"))
    if seconds := _train_seconds(run):
        speed = run.mean("images_per_second") or 0.0
        tiles.append(("Training time", duration(seconds), f"{speed:,.0f} images/s"))
        saves = run.summary.get("checkpoint_seconds")
        if isinstance(saves, int | float):
            part = percent(saves / (seconds + saves), 2)
            tiles.append(("Checkpoints", part, f"{saves:.1f} s beside the training time"))
    if (wait := run.mean("data_wait")) is not None:
        tiles.append(("Data wait", percent(wait), "of the training time"))
    return tiles


def _train_seconds(run: Run) -> float:
    return sum(value for _, value in run.curves.get("train_seconds", []))


def _spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """``96.8 ± 0.4`` (standard deviation), or the one value."""
    if not values:
        return NONE
    text = f"{factor * float(np.mean(values)):.{digits}f}"
    if len(values) > 1:
        text += f" ± {factor * float(np.std(values, ddof=1)):.{digits}f}"
    return text


def comparison(groups: list[Group], of_run: dict[Path, Predictions]) -> Table:
    """A row for each group."""
    head = ["runs", "count", "top-1 (%)", "95 % interval", "best (%)", "NLL", "ECE (%)"]
    rows = []
    for group in groups:
        found = [of_run[run.path] for run in group.runs if run.path in of_run]
        logged = [r.curves["eval/top1"] for r in group.runs if "eval/top1" in r.curves]
        top1 = [100 * float(p.hits.mean()) for p in found] or [points[-1][1] for points in logged]
        interval = NONE
        if len(found) == 1:
            ends = measures.wilson(found[0].hits.sum(), len(found[0].hits))
            interval = " to ".join(f"{100 * end:.1f}" for end in ends)
        best = [max(value for _, value in points) for points in logged]
        ece = [measures.bins(p.confidence, p.hits).ece for p in found]
        nll = [float(p.nll.mean()) for p in found]
        numbers = (_spread(best, 2), _spread(nll, 3), _spread(ece, 1, 100))
        name = shown(group.name)
        rows.append([name, str(len(group.runs)), _spread(top1, 2), interval, *numbers])
    return Table(head, rows, "All runs")


def comparison_notes(groups: list[Group], of_run: dict[Path, Predictions]) -> list[str]:
    """Sentences below the comparison: spreads, and differences between single runs."""
    notes = []
    if any(len(group.runs) > 1 for group in groups):
        notes.append(
            "± is the standard deviation over the runs of a row, which differ in seed, records or "
            "hardware only."
        )
    alone = [(g.name, of_run.get(g.runs[0].path)) for g in groups if len(g.runs) == 1]
    compared = [(name, found) for name, found in alone if found is not None]
    for (name, found), (other, second) in itertools.pairwise(compared):
        if np.array_equal(found.labels, second.labels):
            gain, half = measures.difference(found.hits, second.hits)
            notes.append(
                f"{shown(name)} is {100 * gain:+.2f} ± {100 * half:.2f} points against "
                f"{shown(other)} (95 % interval, paired over images; the variation over seeds is "
                "not in it)."
            )
    return notes


def curves(
    detail: Detail, groups: list[Group], wanted: dict[str, tuple[str, float]]
) -> list[page.Drawn]:
    """A chart for each metric that a run has logged; of top-5 only where it can be wrong."""
    return [
        one
        for metric, (title, factor) in wanted.items()
        if metric != "eval/top5" or detail.has_top5
        for one in detail.drawn(figures.curve(groups, metric, title, factor=factor))
    ]


def curves_text(groups: list[Group]) -> str:
    """The sentence above the curves."""
    text = "As logged during training; losses are means over the logged interval."
    if any(len(group.runs) > 1 for group in groups):
        text += " A line is the mean over seeds, its band reaches from the least to the greatest."
    return text


def confusion(detail: Detail) -> dict[str, Any]:
    """The sections on confusion and on classes."""
    empty: dict[str, Any] = {"confusion": None, "confusion_all": [], "pairs": None, "classes": []}
    empty |= {"class_table": None, "many_classes": False}
    val, network = detail.val, detail.network
    if val is None or network is None:
        return empty
    names = network.classes
    matrix = measures.confusion(val.labels, val.best, len(names))
    order = measures.confused_order(matrix)
    accuracy = measures.class_accuracy(matrix)
    many, overview = len(names) > FEW_CLASSES, list[page.Drawn]()
    title = "Confusion matrix (% of the true class)"
    if many:
        first = measures.most_confused_window(matrix[np.ix_(order, order)], BLOCK)
        window = (first, first + BLOCK)
        overview = detail.drawn(figures.confusion_overview(matrix, order, window))
        order = order[first : first + BLOCK]
        title = f"The {BLOCK} neighbors with the most mistakes among them"
    (drawn,) = detail.drawn(figures.confusion_matrix(matrix, order, names, title, "confusion"))
    pairs = measures.confused_pairs(matrix, 15)
    ranked = [int(c) for c in np.argsort(accuracy.recall, kind="stable") if accuracy.images[c]]
    shown_classes, charts = ranked, list[page.Drawn]()
    title = "Accuracy by class, worst first"
    if many:
        charts = detail.drawn(figures.class_histogram(accuracy))
        shown_classes, title = ranked[:WORST], f"The {WORST} worst classes"
    charts += detail.drawn(figures.class_dots(accuracy, shown_classes, names, title, "classes"))
    rows = [
        [
            shown(names[c], NAME),
            f"{accuracy.images[c]:,}",
            *_percents(accuracy.recall[c], accuracy.precision[c]),
        ]
        for c in ranked
    ]
    head = ["class", "images", "accuracy (%)", "precision (%)"]
    return {
        "confusion": drawn,
        "confusion_all": overview,
        "pairs": pairs
        and Table(
            ["true class", "predicted", "images", "of the class (%)"],
            [
                [
                    *all_shown((names[p.truth], names[p.guess]), NAME),
                    f"{p.images:,}",
                    *_percents(p.share),
                ]
                for p in pairs
            ],
            "Most frequent mistakes",
            texts=2,
        ),
        "classes": charts,
        "class_table": Table(head, rows, f"All {len(rows):,} classes, worst first"),
        "many_classes": many,
    }


def _percents(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" if np.isfinite(share) else NONE for share in shares]


def calibration(
    detail: Detail, groups: list[Group], of_run: dict[Path, Predictions]
) -> dict[str, Any]:
    """Reliability of the run in detail, and a row for each run."""
    if detail.val is None:
        return {"calibration": [], "calibration_table": None}
    found = measures.bins(detail.val.confidence, detail.val.hits)
    rows = []
    for group in groups:
        for run in group.runs:
            if run.path in of_run:
                own = of_run[run.path]
                own_bins = measures.bins(own.confidence, own.hits)
                mean = float(own.confidence.mean())
                shares = _percents(mean, float(own.hits.mean()), own_bins.ece)
                scores = [f"{own.nll.mean():.3f}", f"{own.brier:.3f}"]
                rows.append([shown(run.name), *shares, *scores])
    head = ["run", "confidence (%)", "accuracy (%)", "ECE (%)", "NLL", "Brier"]
    return {
        "calibration": detail.drawn(figures.reliability(found)),
        "calibration_table": Table(head, rows, "Calibration on the validation images"),
    }


def pseudo(detail: Detail, groups: list[Group]) -> dict[str, Any]:
    """The section on pseudo labels: over time, by threshold and by class."""
    charts = curves(detail, groups, PSEUDO_CURVES)
    text = "In training: as logged. " if charts else "This run logged no pseudo labels. "
    rows, final = None, list[page.Drawn]()
    unlabeled, network, used = detail.unlabeled, detail.network, detail.run.threshold
    if unlabeled is None or network is None:
        detail.gone.setdefault("pseudo", "those of the newest network: --unlabeled 0")
    else:
        count = f"{len(unlabeled.labels):,} unlabeled images"
        text += f"By the newest network: {count}, in evaluation's crop"
        known = unlabeled.known
        if not known.any():
            detail.gone["pseudo"] = "their accuracy: no unlabeled image has a known label"
        else:
            text += f"; {int(known.sum()):,} of them have a known label, by which they are counted "
            text += "as right or wrong (a pack's labeled images are among them, if it was made "
            text += "without --unlabeled rest)"
            part = unlabeled.confidence[known], unlabeled.hits[known]
            chart, levels = figures.thresholds(*part, used)
            final = detail.drawn(chart)
            # Without a threshold in the recipe: the surer half.
            level = used or float(np.median(unlabeled.confidence[known]))
            final += detail.drawn(_pseudo_by_class(unlabeled, network.classes, level))
            cells = [
                [f"{t:g}" + (" (recipe)" if t == used else ""), *_percents(s, a)]
                for t, s, a in levels
            ]
            head = ["threshold", "reach it (%)", "of these right (%)"]
            rows = Table(head, cells, "The newest network, by threshold")
        text += f". The recipe's threshold is {used:g}." if used else "."
    return {
        "pseudo": charts,
        "pseudo_final": final,
        "pseudo_text": text,
        "threshold_table": rows,
    }


def _pseudo_by_class(
    unlabeled: Predictions, names: Sequence[str], threshold: float
) -> Chart | None:
    known = unlabeled.known
    labels, hits = unlabeled.labels[known], unlabeled.hits[known]
    above = unlabeled.confidence[known] >= threshold
    count, used, right = (
        np.bincount(labels, weight, minlength=len(names))
        for weight in (np.ones(len(labels)), above, above & hits)
    )
    with np.errstate(invalid="ignore"):
        share, accuracy = used / count, right / used
    ranked = [int(c) for c in np.argsort(share, kind="stable") if count[c]]
    chosen = ranked[: WORST if len(ranked) > FEW_CLASSES else None]
    return figures.pseudo_by_class(share, accuracy, chosen, names, threshold)


def speed(groups: list[Group]) -> Table | None:
    """A row for each run; None without metrics."""
    head = ["run", "steps", "training time", "images/s", "data wait (%)", "devices"]
    rows = []
    for run in (run for group in groups for run in group.runs):
        if not run.curves:
            continue
        speed, wait = run.mean("images_per_second"), run.mean("data_wait")
        devices = run.environment.get("devices") or [NONE]
        cells = [f"{run.steps_done:,}", duration(_train_seconds(run))]
        cells += [f"{speed:,.0f}" if speed else NONE, *_percents(np.nan if wait is None else wait)]
        rows.append([shown(run.name), *cells, shown(first_few(map(str, devices), 2))])
    return Table(head, rows) if rows else None


def options(detail: Detail, groups: list[Group]) -> dict[str, Any]:
    """Configuration, environment and the differences between groups."""
    run = detail.run
    default = RunConfig(algorithm=type(run.config.algorithm)())
    defaults = {option.key: option.value for option in all_options(default)}
    every = [[key, shown(str(value))] for key, value in run.options.items()]
    changed = [
        [key, shown(str(value)), shown(str(defaults[key]))]
        for key, value in run.options.items()
        if key in defaults and value != defaults[key]
    ]
    environment = [
        [key, shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
        for key, value in run.environment.items()
        if key != "earlier_sessions"
    ]
    if sessions := run.environment.get("earlier_sessions"):
        environment.append(["earlier sessions", str(len(sessions))])
    if not environment:
        detail.gone["environment"] = shown(f"{run.path}/env.json is missing or damaged")
    different = [[key, *all_shown(values)] for key, values in differences(groups)]
    return {
        "recipe": run.config.recipe,
        "every": every,
        "changed": changed,
        "environment": environment,
        "different": different,
        "different_heads": ["option", *all_shown([group.name for group in groups])],
    }
