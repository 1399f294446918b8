"""Reads runs, computes what is missing in their caches, and writes the page and its figures."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

import mpl_fast
from mpl_fast.config import RunConfig
from mpl_fast.config.fields import all_options
from mpl_fast.data.split_images import SplitImages
from mpl_fast.distributed import ranks_of_launcher
from mpl_fast.errors import ConfigError, DataError, UserError, output_errors
from mpl_fast.first_few import counted, first_few
from mpl_fast.report import figures, measures, page, pictures, verdict
from mpl_fast.report.embedding import FEWEST, embed
from mpl_fast.report.figures import Chart
from mpl_fast.report.names import all_shown, shown
from mpl_fast.report.page import Table
from mpl_fast.report.predictions import Network, Predictions, Say
from mpl_fast.report.runs import Group, Run, differences, grouped, read
from mpl_fast.report.verdict import percent
from mpl_fast.training.console import duration

LABELED = 2000  # labeled training images that are evaluated
UNLABELED_POINTS = 0.25  # on the map, for each validation image there
FEW_CLASSES = 40  # of which each has a row of its own
BLOCK = 30  # classes of the confusion matrix of many
MISTAKES = 24
VIEWED, DRAWS = 6, 4  # images, and strong views of each
NONE = "-"  # in a cell without a value
WORST = 20
CURVES = {
    "eval/top1": ("Validation top-1 (%)", 1.0),
    "eval/top5": ("Validation top-5 (%)", 1.0),
    "loss/labeled": ("Loss on labeled images", 1.0),
    "loss/consistency": ("Consistency loss", 1.0),
    "loss/student": ("Loss of the student", 1.0),
    "feedback": ("Feedback of the student", 1.0),
}
PSEUDO_CURVES = {
    "mask_rate": ("Unlabeled images used (%)", 100.0),
    "accuracy/pseudo": ("Accuracy of the pseudo labels (%)", 100.0),
    "confidence": ("Confidence of the pseudo labels (%)", 100.0),
}
SPEED_CURVES = {
    "images_per_second": ("Images per second", 1.0),
    "data_wait": ("Data wait (% of training time)", 100.0),
}
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    out: Path
    figures: Path | None = None
    unlabeled: int = 5000
    """Unlabeled images to predict at most."""
    points: int = 2000
    """Validation images on the map of features at most; 0: no map."""
    force: bool = False
    options: tuple[str, ...] = ()
    """Options of train.py that replace those of the runs."""


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


def write_report(folders: Sequence[Path], wanted: Wanted, say: Say = print) -> None:
    """Writes the page, and the figures where they are wanted. Raises `UserError` before anything is
    written if a folder is no run, or no folder has anything to show."""
    _check(wanted)
    runs = [read(folder) for folder in folders]
    groups = grouped(runs)
    networks = [_network(run, wanted, say) for run in runs]
    detail = Detail(groups[0], runs[0])
    if isinstance(networks[0], Network):
        detail.network = networks[0]
    if not any(run.curves for run in runs) and not any(isinstance(n, Network) for n in networks):
        raise DataError(f"{folders[0]} has nothing to show yet: let it train to a checkpoint")
    validated = [_validated(network, wanted, say) for network in networks]
    if isinstance(validated[0], str):
        of_network = ("summary", "confusion", "classes", "calibration", "mistakes", "features")
        detail.gone = dict.fromkeys(of_network, validated[0])
    else:
        detail.val = validated[0]
    of_run = {run.path: v for run, v in zip(runs, validated, strict=True) if not isinstance(v, str)}
    _predict_training_images(detail, wanted)
    values = _values(detail, groups, of_run, wanted)
    text = page.render(values)
    page.write(wanted.out, text)
    if wanted.figures:
        written = figures.save(detail.charts, wanted.figures)
        say(f"{wanted.figures}: {len(written)} figures")
    for name, reason in detail.gone.items():
        say(f"not shown: {name}: {reason}")
    say(f"{wanted.out} ({wanted.out.stat().st_size / 1e6:.1f} MB)")


def _check(wanted: Wanted) -> None:
    if ranks_of_launcher()[1] > 1:
        raise ConfigError("a report is made by one process: run it without torchrun")
    for name in ("unlabeled", "points"):
        if getattr(wanted, name) < 0:
            raise ConfigError(f"--{name} {getattr(wanted, name)}: must be at least 0")
    page.check_out(wanted.out, wanted.force)
    if wanted.figures:
        with output_errors(wanted.figures):
            wanted.figures.mkdir(parents=True, exist_ok=True)


def _network(run: Run, wanted: Wanted, say: Say) -> Network | str:
    """The network, or why there is none."""
    try:
        network = Network(run.path, wanted.options, say)
    except UserError as error:
        return shown(str(error))
    for warning in network.warnings:
        say(f"warning: {warning}")
    return network


def _validated(network: Network | str, wanted: Wanted, say: Say) -> Predictions | str:
    """Predictions on the validation split, or why there are none."""
    if isinstance(network, str):
        return network
    try:
        found = network.predictions("val", 0, wanted.points)
    except UserError as error:
        return shown(str(error))
    return found if found.known.all() else "the validation images have no labels"


def _predict_training_images(detail: Detail, wanted: Wanted) -> None:
    network = detail.network
    if network is None or detail.val is None:
        reason = detail.gone.get("summary", "no network")
        detail.gone |= {"pseudo": reason, "views": reason}
        return
    detail.labeled = detail.attempt((), lambda: network.predictions("labeled", LABELED, 0))
    if wanted.unlabeled:
        mapped = round(wanted.points * UNLABELED_POINTS)
        detail.unlabeled = detail.attempt(
            ("pseudo",), lambda: network.predictions("unlabeled", wanted.unlabeled, mapped)
        )


def _values(
    detail: Detail, groups: list[Group], of_run: dict[Path, Predictions], wanted: Wanted
) -> dict[str, Any]:
    """All values of the template."""
    run = detail.run
    several = len(groups) > 1 or len(groups[0].runs) > 1
    found = verdict.findings(run, detail.val, detail.labeled, detail.unlabeled)
    values = {
        "title": f"Training report: {first_few(all_shown([g.name for g in groups]), 3, ' · ')}",
        "subtitle": _subtitle(detail, several),
        "findings": found,
        "tiles": _tiles(detail),
        "comparison": _comparison(groups, of_run) if several else None,
        "comparison_notes": _comparison_notes(groups, of_run) if several else [],
        "curves": _curves(detail, groups, CURVES),
        "curves_text": _curves_text(groups),
        **_confusion(detail),
        **_calibration(detail, groups, of_run),
        **_pseudo(detail, groups),
        "mistakes": _mistakes(detail),
        **_views(detail),
        **_feature_map(detail, wanted),
        "speed": _curves(detail, groups, SPEED_CURVES),
        "speed_table": _speed(groups),
        **_options(detail, groups),
        "footer": f"mpl_fast {mpl_fast.__version__}, {time.strftime('%Y-%m-%d %H:%M')}. "
        "This page loads nothing from the network.",
    }
    if not values["curves"]:
        detail.gone["curves"] = f"{run.path}/metrics.jsonl has no rows"
    if not values["speed"]:
        detail.gone["speed"] = f"{run.path}/metrics.jsonl has no rows"
    names = {
        "summary": "Summary", "curves": "Curves", "confusion": "Confusion", "classes": "Classes",
        "calibration": "Calibration", "pseudo": "Pseudo labels", "mistakes": "Mistakes",
        "views": "Views", "features": "Feature map", "speed": "Speed", "differences": "Differences",
        "config": "Configuration",
    }  # fmt: skip
    if not values["different"]:
        del names["differences"]
    return values | {"gone": detail.gone, "sections": [*names.items()]}


def _subtitle(detail: Detail, several: bool) -> str:
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
    return f"In detail: {shown(str(run.path))} · {text}" if several else text


def _tiles(detail: Detail) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top."""
    run, val, tiles = detail.run, detail.val, list[tuple[str, str, str]]()
    if val is not None:
        for name, hits in (("Top-1", val.hits), ("Top-5", val.top5)):
            if name == "Top-5" and len(val.guesses[0]) < 5:
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
        tiles.append(("Unlabeled used", percent(share), "of a batch, at the end"))
    if seconds := _train_seconds(run):
        speed = run.mean("images_per_second") or 0.0
        tiles.append(("Training time", duration(seconds), f"{speed:,.0f} images/s"))
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


def _comparison(groups: list[Group], of_run: dict[Path, Predictions]) -> Table:
    head = [
        "runs",
        "count",
        "top-1 (%)",
        "95 % interval",
        "top-5 (%)",
        "best (%)",
        "NLL",
        "ECE (%)",
    ]
    rows = []
    for group in groups:
        found = [of_run[run.path] for run in group.runs if run.path in of_run]
        logged = [r.curves["eval/top1"] for r in group.runs if "eval/top1" in r.curves]
        top1 = [100 * float(p.hits.mean()) for p in found] or [points[-1][1] for points in logged]
        interval = NONE
        if len(found) == 1:
            ends = measures.wilson(found[0].hits.sum(), len(found[0].hits))
            interval = " to ".join(f"{100 * end:.1f}" for end in ends)
        five = [float(p.top5.mean()) for p in found]
        best = [max(value for _, value in points) for points in logged]
        ece = [measures.bins(p.confidence, p.hits).ece for p in found]
        nll = [float(p.nll.mean()) for p in found]
        numbers = (_spread(five, 1, 100), _spread(best, 1), _spread(nll, 3), _spread(ece, 1, 100))
        name = shown(group.name)
        rows.append([name, str(len(group.runs)), _spread(top1, 2), interval, *numbers])
    return Table(head, rows, "All runs")


def _comparison_notes(groups: list[Group], of_run: dict[Path, Predictions]) -> list[str]:
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


def _curves(
    detail: Detail, groups: list[Group], wanted: dict[str, tuple[str, float]]
) -> list[page.Drawn]:
    return [
        one
        for metric, (title, factor) in wanted.items()
        for one in detail.drawn(figures.curve(groups, metric, title, factor=factor))
    ]


def _curves_text(groups: list[Group]) -> str:
    text = "As logged during training; losses are means over the logged interval."
    if any(len(group.runs) > 1 for group in groups):
        text += " A line is the mean over seeds, its band reaches from the least to the greatest."
    return text


def _confusion(detail: Detail) -> dict[str, Any]:
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
            shown(names[c], 60),
            f"{accuracy.images[c]:,}",
            *_percents(accuracy.recall[c], accuracy.precision[c]),
        ]
        for c in ranked
    ]
    head = ["class", "images", "accuracy (%)", "precision (%)"]
    return {
        "confusion": drawn,
        "confusion_all": overview,
        "pairs": Table(
            ["true class", "predicted", "images", "of the class (%)"],
            [
                [
                    shown(names[p.truth]),
                    shown(names[p.guess]),
                    str(p.images),
                    f"{100 * p.share:.1f}",
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


def _calibration(
    detail: Detail, groups: list[Group], of_run: dict[Path, Predictions]
) -> dict[str, Any]:
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
                rows.append([shown(run.path.name), *shares, *scores])
    head = ["run", "confidence (%)", "accuracy (%)", "ECE (%)", "NLL", "Brier"]
    return {
        "calibration": detail.drawn(figures.reliability(found)),
        "calibration_table": Table(head, rows, "Calibration on the validation images"),
    }


def _pseudo(detail: Detail, groups: list[Group]) -> dict[str, Any]:
    """The section on pseudo labels: over time, by threshold and by class."""
    charts = _curves(detail, groups, PSEUDO_CURVES)
    text = "In training: as logged. " if charts else ""
    rows, final = None, list[page.Drawn]()
    unlabeled, network, used = detail.unlabeled, detail.network, detail.run.threshold
    if unlabeled is None or network is None:
        text += "" if charts else "This recipe uses no unlabeled images."
    else:
        count = f"{len(unlabeled.labels):,} unlabeled images"
        text += f"By the final network: {count}, in evaluation's crop"
        known = unlabeled.known
        if known.sum() < 2:
            detail.gone["pseudo"] = "accuracy by class: the unlabeled images have no known labels"
        else:
            text += f"; {int(known.sum()):,} of them have a known label, which training never used"
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
            head = ["threshold", "above (%)", "right (%)"]
            rows = Table(head, cells, "The final network, by threshold")
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
    return figures.pseudo_by_class(share, np.nan_to_num(accuracy), chosen, names, threshold)


def _split_images(detail: Detail, split: str) -> SplitImages:
    assert detail.network is not None
    return SplitImages(detail.network.manifest.splits[split])


def _mistakes(detail: Detail) -> list[dict[str, str]]:
    val, network = detail.val, detail.network
    if val is None or network is None:
        return []
    wrong = np.flatnonzero(~val.hits)
    if not len(wrong):
        detail.gone["mistakes"] = "every validation image is right"
        return []
    worst = wrong[np.argsort(-val.confidence[wrong], kind="stable")][:MISTAKES]
    images = detail.attempt(("mistakes",), lambda: _split_images(detail, "val"))
    if images is None:
        return []
    found, tiles = [], []
    for place in worst:
        picture = pictures.thumbnail(images.image(int(place)))
        truth, guess = (
            shown(network.classes[label], 48) for label in (val.labels[place], val.best[place])
        )
        probability = percent(float(val.confidence[place]), 1)
        found.append(
            {"uri": pictures.data_uri(picture), "truth": truth, "guess": guess}
            | {"percent": probability, "file": shown(images.names[int(place)])}
        )
        tiles.append((picture, f"{shown(guess, 16)} {probability}\nis {shown(truth, 16)}"))
    title = "Most certain mistakes"
    detail.charts.append(figures.picture_grid("mistakes", title, tiles, columns=6))
    return found


def _views(detail: Detail) -> dict[str, Any]:
    nothing: dict[str, Any] = {"views": [], "view_heads": []}
    network = detail.network
    if network is None:
        return nothing
    from mpl_fast.data.contact_sheet import draw_rows, titles  # late: imports DALI

    def draw() -> dict[str, Any]:
        config, split = network.config, network.manifest.splits["unlabeled"]
        network.say(f"{network.run}: drawing views")
        rows = draw_rows(config.data, split, min(VIEWED, split.records), DRAWS, seed=config.seed)
        tiles = [pictures.jpeg(pictures.reduced(tile), 90) for _, row in rows for tile in row]
        stored = {f"tile_{number}": tile for number, tile in enumerate(tiles)}
        return {"labels": np.array([label for label, _ in rows]), **stored}

    def stored() -> dict[str, Any]:
        data = [(k, str(v)) for k, v in detail.run.options.items() if k.startswith("data.")]
        key = [data, network.config.seed, network.manifest.content, VIEWED, DRAWS]
        return network.cached("views", key, draw)

    drawn = detail.attempt(("views",), stored)
    if drawn is None:
        return nothing
    heads, manifest = titles(DRAWS), network.manifest
    tiles, rows = [], []
    for number, label in enumerate(drawn["labels"].tolist()):
        name = manifest.class_text(label) if label >= 0 else "no label"
        first = number * len(heads)
        row = [drawn[f"tile_{first + i}"].tobytes() for i in range(len(heads))]
        rows.append({"name": shown(name, 48), "uris": [pictures.uri_of(tile) for tile in row]})
        tiles += [(pictures.thumbnail(t), head) for t, head in zip(row, heads, strict=True)]
    detail.charts.append(figures.picture_grid("views", "Training views", tiles, len(heads)))
    return {"views": rows, "view_heads": heads}


def _feature_map(detail: Detail, wanted: Wanted) -> dict[str, Any]:
    nothing: dict[str, Any] = {"map_chart": None, "map_data": "", "sheet": ""}
    val, network = detail.val, detail.network
    if val is None or network is None:
        return nothing
    parts = [("val", val)]
    if detail.unlabeled is not None and len(detail.unlabeled.places):
        parts.append(("unlabeled", detail.unlabeled))
    features = np.concatenate([found.features for _, found in parts])
    if len(features) < FEWEST:
        why = "--points 0" if not wanted.points else f"only {len(features)} images"
        detail.gone["features"] = why
        return nothing
    labels, guesses, confidence = (
        np.concatenate([getattr(found, name)[found.places] for _, found in parts])
        for name in ("labels", "best", "confidence")
    )

    def compute() -> dict[str, Any]:
        network.say(f"{network.run}: t-SNE of {len(features):,} images")
        began = time.perf_counter()
        images = [(split, _split_images(detail, split), found.places) for split, found in parts]
        tiles = [(split, int(place)) for _, split, places in images for place in places]
        content = {"points": embed(features), "sheet": pictures.jpeg(pictures.sheet(tiles))}
        network.say(f"{network.run}: t-SNE took {duration(time.perf_counter() - began)}")
        return content

    key = [pictures.TILE, pictures.ACROSS, hashlib.sha256(features.tobytes()).hexdigest()]
    stored = detail.attempt(("features",), lambda: network.cached("map", key, compute))
    if stored is None:
        return nothing
    own = np.arange(len(val.places), len(features))
    chart, placed = figures.feature_map(
        stored["points"], labels, guesses, network.classes, unlabeled=own
    )
    points = [
        [*place, int(truth), int(guess), round(100 * float(p), 1), int(number >= len(val.places))]
        for number, (place, truth, guess, p) in enumerate(
            zip(placed.round(1).tolist(), labels, guesses, confidence, strict=True)
        )
    ]
    data = {"across": pictures.ACROSS, "names": all_shown(network.classes, 60), "points": points}
    return {
        "map_chart": detail.drawn(chart)[0],
        "map_data": htmlsafe_json_dumps(data, separators=(",", ":")),
        "sheet": pictures.uri_of(stored["sheet"].tobytes()),
    }


def _speed(groups: list[Group]) -> Table | None:
    head = ["run", "steps", "training time", "images/s", "data wait (%)", "devices"]
    rows = []
    for run in (run for group in groups for run in group.runs):
        if not run.curves:
            continue
        speed, wait = run.mean("images_per_second"), run.mean("data_wait")
        devices = run.environment.get("devices") or [NONE]
        cells = [f"{run.steps_done:,}", duration(_train_seconds(run))]
        cells += [f"{speed:,.0f}" if speed else NONE, *_percents(np.nan if wait is None else wait)]
        rows.append([shown(run.path.name), *cells, shown(first_few(map(str, devices), 2))])
    return Table(head, rows) if rows else None


def _options(detail: Detail, groups: list[Group]) -> dict[str, Any]:
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
        detail.gone["environment"] = f"{run.path}/env.json is missing or damaged"
    different = [[key, *all_shown(values)] for key, values in differences(groups)]
    return {
        "recipe": run.config.recipe,
        "every": every,
        "changed": changed,
        "environment": environment,
        "different": different,
        "different_heads": ["option", *all_shown([group.name for group in groups])],
    }
