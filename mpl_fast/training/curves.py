"""Learning curves of runs as one picture, from their metrics.jsonl."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpl_fast.config.aliases import METRIC_NAMES, renamed
from mpl_fast.errors import ConfigError, DataError, output_errors
from mpl_fast.untrusted import json_object, json_value

METRICS, SUMMARY = "metrics.jsonl", "summary.json"  # in a run directory
NUMBERS = ("top1", "steps", "train_seconds", "images_per_second")  # of every summary
PANELS = {
    "eval/top1": "held-out top-1 (%)",
    "accuracy/pseudo": "accuracy of the pseudo labels",
    "mask_rate": "share of unlabeled images used",
    "feedback": "feedback h",
}


def draw(runs: Sequence[tuple[str, Path]], out: Path, title: str = "") -> None:
    """Writes a PNG, PDF or SVG with a panel for each quantity that at least one run has.

    `runs` are pairs of label and run directory; runs of one label, such as seeds, share a color.
    Raises `DataError` for a folder without metrics and `ConfigError` for an unusable `out`.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a run is no formula
    from matplotlib import pyplot

    curves = {folder: read(folder) for _, folder in runs}
    panels = [name for name in PANELS if any(name in c for c in curves.values())]
    if not panels:
        raise DataError(f"{runs[0][1]} has nothing to draw yet: let it train to an evaluation")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out {out}: the name must end in .png, .pdf or .svg")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.6), squeeze=False)
    colors = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(label for label, _ in runs))}
    for axis, name in zip(axes[0], panels, strict=True):
        named: dict[str, Any] = {}
        for label, folder in runs:
            if name in curves[folder]:
                steps, values = zip(*curves[folder][name], strict=True)
                dot = "." if len(steps) == 1 else None  # one point makes no line
                (line,) = axis.plot(steps, values, color=colors[label], marker=dot, alpha=0.85)
                named.setdefault(label.encode(errors="backslashreplace").decode(), line)
        axis.set(xlabel="step", title=PANELS[name])
        axis.grid(alpha=0.3)
        axis.legend(list(named.values()), list(named), frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    with output_errors(out):
        figure.savefig(out, dpi=110)
    pyplot.close(figure)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every quantity in a run's metrics.jsonl."""
    file = folder / METRICS
    if not file.exists():
        raise DataError(f"{file} does not exist: name a run directory that has trained")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(file):
        step = row.pop("step")
        for name, value in row.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl under present names; other lines, such as one that a kill has cut
    short, are left out. Raises `DataError` if it cannot be read."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return [renamed(row, METRIC_NAMES) for row in map(row_of, lines) if row is not None]


def checkpoint_seconds(file: Path) -> float:
    """For how long training waited for saves, by the events in a metrics.jsonl. Raises `OSError`
    if it cannot be read."""
    total = 0.0
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, TypeError, KeyError):
            event = json_value(line)
            total += float(event["seconds"]) if event["event"] == "checkpoint" else 0.0
    return total


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl: numbers by name, `step` among them; None for others."""
    try:
        row = json_value(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(map(is_number, row.values())) else None


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json under present names; empty if the run has not ended or it is damaged."""
    found = renamed(json_object(folder / SUMMARY), METRIC_NAMES)
    return found if all(is_number(found.get(name)) for name in NUMBERS) else {}


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that can be drawn and compared."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)
