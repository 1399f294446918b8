"""Measurements of the feedbacks as JSON and as Markdown tables."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tools.studies.command import table, versions
from tools.studies.feedbacks.measure import TIMED, Nearness, Options, Passes, relative
from tools.studies.feedbacks.problems import CLASSES, FEATURES, HIDDEN, KINDS, LABELED, RATE

FORMAT = "mpl_fast.feedbacks/2"
NEARNESS = ("feedback", "mean cosine(g, e)", "cosine > 0", "error or noise, relative", "size")
PASSES = ("feedback", "teacher, all views", "student: unlabeled", "labeled", "both together")
TIME = ("feedback", "time of a step, median (quartiles)")


@dataclass(frozen=True)
class Results:
    """All measurements, by the feedback's name."""

    nearness: Mapping[str, Mapping[int, Nearness]]  # by unlabeled images
    passes: Mapping[str, Mapping[str, Passes]]  # by network
    seconds: Mapping[str, list[float]]  # of a step, one a round
    threads: int

    @property
    def seconds_off(self) -> float:
        """Median of a step without feedback."""
        return statistics.median_high(self.seconds["off"])


def as_json(results: Results, options: Options) -> str:
    """Settings, versions and all numbers."""
    network = {"network": [FEATURES, HIDDEN, CLASSES], "labeled": LABELED, "rate": RATE}
    timed = {"timed": TIMED, "threads": results.threads}
    whole = {
        "format": FORMAT,
        "settings": asdict(options) | network | timed,
        "versions": versions("torch"),
        "nearness": {
            name: {str(size): asdict(row) for size, row in rows.items()}
            for name, rows in results.nearness.items()
        },
        "passes": results.passes,
        "time": {"relative": relative(results.seconds), "seconds_off": results.seconds_off},
    }
    return json.dumps(whole, indent=1) + "\n"


def as_markdown(results: Results, options: Options) -> str:
    """Three tables, each below its explanation."""
    near, times = results.nearness.items(), relative(results.seconds).items()
    rows = [
        _problems(options),
        "",
        *table(NEARNESS, (_nearness(name, list(rows.values())) for name, rows in near)),
        "",
        "Error: mean of |g - e| / |e|. Noise: standard deviation of g over draws / length of what "
        "it should be on average, which for sampled is e / B_u; median over problems. Size: the "
        "mean of g along that, ± standard error over problems; 1 is no bias.",
        "",
        "Passes of one step, forward / backward (+ forward with a derivative):",
        "",
        *table(PASSES, (_passes(name, counted) for name, counted in results.passes.items())),
        "",
        _timed(results, options),
        "",
        *table(TIME, (_time(name, row) for name, row in times)),
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


def _nearness(name: str, rows: list[Nearness]) -> list[str]:
    def each(values: list[str]) -> str:
        return " / ".join(values) if len(set(values)) > 1 else values[0]

    spread = [
        f"error {row.error:.2g}" if row.error is not None else f"noise {row.noise:.2g}"
        for row in rows
    ]
    sizes = [
        "" if row.size is None else f"{row.size:.2f} ± {row.size_error or 0.0:.2f}" for row in rows
    ]
    return [
        KINDS[name].title,
        each([f"{row.cosine:+.2f}" for row in rows]),
        each([f"{100 * row.positive:.0f} %" for row in rows]),
        each(spread),
        each(sizes),
    ]


def _passes(name: str, counted: Mapping[str, Passes]) -> list[str]:
    def cell(network: str, rows: str) -> str:
        passes = counted[network]
        text = f"{passes['forward'][rows]} / {passes['backward'][rows]}"
        return text + (f" + {passes['jvp'][rows]}" if rows in passes["jvp"] else "")

    student = [cell("student", rows) for rows in ("unlabeled", "labeled", "together")]
    return [KINDS[name].title, cell("teacher", "together"), *student]


def _timed(results: Results, options: Options) -> str:
    return (
        f"Time of a step as a multiple of feedback off in the same round, {options.rounds} rounds "
        "in which the feedbacks take turns: a convolutional network of two layers with batch norm, "
        f"float32, {TIMED['labeled']} labeled and {TIMED['unlabeled']} unlabeled images of "
        f"{TIMED['side']} x {TIMED['side']} pixels, CPU, {results.threads} thread(s); a step "
        f"without feedback took {1000 * results.seconds_off:.1f} ms. The machine may have been "
        "shared: read the quartiles."
    )


def _time(name: str, row: Mapping[str, float]) -> list[str]:
    return [KINDS[name].title, "{median:.2f} ({low:.2f} to {high:.2f})".format(**row)]
