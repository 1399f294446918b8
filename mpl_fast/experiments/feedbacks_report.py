"""What was measured of the feedbacks, as numbers (JSON) and as tables (Markdown)."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import mpl_fast
from mpl_fast.experiments.feedbacks_measure import CLOCKED, Nearness, Options
from mpl_fast.experiments.feedbacks_problems import CLASSES, FEATURES, HIDDEN, KINDS, LABELED, RATE

FORMAT = "mpl_fast.feedbacks/1"


@dataclass(frozen=True)
class Results:
    """Everything, by the feedback's name."""

    nearness: Mapping[str, Mapping[int, Nearness]]  # by unlabeled images
    passes: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]  # network, what, rows
    relative: Mapping[str, Mapping[str, float]]
    seconds_off: float  # median of a step without feedback
    threads: int


def as_json(results: Results, options: Options) -> str:
    """Settings, versions and all numbers."""
    import torch

    whole = {
        "format": FORMAT,
        "settings": asdict(options)
        | {"network": [FEATURES, HIDDEN, CLASSES], "labeled": LABELED, "rate": RATE}
        | {"clocked": CLOCKED, "threads": results.threads},
        "versions": {
            "mpl_fast": mpl_fast.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "nearness": {
            name: {str(size): asdict(row) for size, row in rows.items()}
            for name, rows in results.nearness.items()
        },
        "passes": results.passes,
        "time": {"relative": results.relative, "seconds_off": results.seconds_off},
    }
    return json.dumps(whole, indent=1) + "\n"


def as_markdown(results: Results, options: Options) -> str:
    """Three tables, with what they mean above each."""
    rows = [
        _problems(options),
        "",
        "| feedback | mean cosine(g, e) | cosine > 0 | error or noise, relative | size |",
        "| --- | --- | --- | --- | --- |",
        *(_nearness(name, results.nearness[name]) for name in results.nearness),
        "",
        "Error: mean of |g - e| / |e|. Noise: standard deviation of g over draws / length of what "
        "it should be on average, which for sampled is e / B_u; median over problems. Size: the "
        "mean of g along that, ± standard error over problems; 1 is no bias.",
        "",
        "Passes of one step, forward / backward (+ forward with a derivative):",
        "",
        "| feedback | teacher, all views | student: unlabeled | labeled | both together |",
        "| --- | --- | --- | --- | --- |",
        *(_passes(name, results.passes[name]) for name in results.passes),
        "",
        _clock(results, options),
        "",
        "| feedback | time of a step, median (quartiles) |",
        "| --- | --- |",
        *(_time(name, row) for name, row in results.relative.items()),
    ]
    return "\n".join(rows) + "\n"


def _problems(options: Options) -> str:
    sizes = ", ".join(str(size) for size in options.sizes)
    return (
        "Gradients of the feedback term in the teacher's weights g, against the exact one e by "
        f"autograd through the student's step: {options.problems} random problems "
        f"({options.drawn} x {options.draws} draws where labels are drawn), float64, networks "
        f"{FEATURES}-{HIDDEN}-{CLASSES}, {LABELED} labeled and B_u = {sizes} unlabeled rows, "
        f"student's rate {RATE}, initial weights times {options.scale:g}, seed {options.seed}."
    )


def _nearness(name: str, rows: Mapping[int, Nearness]) -> str:
    def each(values: list[str]) -> str:
        return " / ".join(values) if len(set(values)) > 1 else values[0]

    found = list(rows.values())
    spread = [
        f"error {row.error:.2g}" if row.error is not None else f"noise {row.noise:.2g}"
        for row in found
    ]
    sizes = [
        "" if row.size is None else f"{row.size:.2f} ± {row.size_error or 0.0:.2f}" for row in found
    ]
    cells = [
        KINDS[name].title,
        each([f"{row.cosine:+.2f}" for row in found]),
        each([f"{100 * row.positive:.0f} %" for row in found]),
        each(spread),
        each(sizes),
    ]
    return "| " + " | ".join(cells) + " |"


def _passes(name: str, counted: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    def cell(network: str, rows: str) -> str:
        what = counted[network]
        text = f"{what['forward'].get(rows, 0)} / {what['backward'].get(rows, 0)}"
        return text + (f" + {what['tangent'][rows]}" if rows in what["tangent"] else "")

    student = [cell("student", rows) for rows in ("unlabeled", "labeled", "together")]
    return "| " + " | ".join([KINDS[name].title, cell("teacher", "together"), *student]) + " |"


def _clock(results: Results, options: Options) -> str:
    return (
        f"Time of a step as a multiple of feedback off in the same round, {options.rounds} rounds "
        "in which the feedbacks take turns: a convolutional network of two layers with batch norm, "
        f"float32, {CLOCKED['labeled']} labeled and {CLOCKED['unlabeled']} unlabeled images of "
        f"{CLOCKED['side']} x {CLOCKED['side']} pixels, CPU, {results.threads} thread(s); a step "
        f"without feedback took {1000 * results.seconds_off:.1f} ms. The machine may have been "
        "shared: read the quartiles."
    )


def _time(name: str, row: Mapping[str, float]) -> str:
    return f"| {KINDS[name].title} | {row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |"
