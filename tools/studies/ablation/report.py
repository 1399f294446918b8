"""Results of an ablation: statistics over seeds, paired differences, and their table."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpl_fast.atomic import write_json, write_text
from tools.studies import command
from tools.studies.ablation.plan import Variant
from tools.studies.ablation.run import Result

Json = dict[str, Any]
KEYS = ("top1", "top5", "steps", "train_seconds", "images_per_second")  # of a run's summary.json


def summarize(variants: Sequence[Variant], results: Sequence[Result]) -> list[Json]:
    """A row for each variant: means over the runs that ended, and differences to the first variant,
    and to `against`, over the seeds that ended with both."""
    rows = []
    for variant in variants:
        mine = [r for r in results if r.job.variant == variant]
        top1, seconds, rate = (
            [r.summary[key] for r in mine if r.summary]
            for key in ("top1", "train_seconds", "images_per_second")
        )
        row: Json = {
            "variant": variant.name,
            "settings": list(variant.settings),
            "top1": _mean(top1),
            "top1_sd": _sd(top1),
            **_paired(variant.name, variants[0].name, results),
            "train_seconds": _mean(seconds),
            "images_per_second": _mean(rate),
        }
        if variant.against:
            paired = _paired(variant.name, variant.against, results)
            row["besides"] = {"against": variant.against, **paired}
        notes = [w for r in mine for w in r.warnings if "never moves" in w]
        row["notes"] = list(dict.fromkeys(notes))  # each once: seeds share them
        rows.append({**row, "runs": [_run(r) for r in mine]})
    return rows


def write(out: Path, rows: Sequence[Json], config: str, seeds: int) -> str:
    """Writes ablation.json and ablation.md, each as a whole; returns the table of the latter."""
    text = table(rows, seeds)
    write_json(out / "ablation.json", {"config": config, "variants": rows})
    write_text(out / "ablation.md", f"# Ablation of {config}\n\n{text}\n")
    return text


def table(rows: Sequence[Json], seeds: int) -> str:
    """Markdown; `seeds` is how many each variant was to have."""
    first = rows[0]["variant"]
    head = ("variant", "top-1 (%)", f"against `{first}`", "seconds of training", "images/s", "runs")
    over, error = f", mean ± standard deviation over {seeds} seeds", ", mean ± standard error"
    if seeds == 1:
        over, error = ", one seed", ""
    lines = [
        f"Top-1 of the last evaluation (averaged weights){over}; "
        f"differences to `{first}` are between runs of one seed{error}.",
        "",
        *command.table(head, (_cells(row, first, seeds) for row in rows)),
        "",
    ]
    for row in rows:
        if besides := row.get("besides"):
            gain = _pm(besides["gain"], besides["gain_se"], "+.2f")
            lines.append(f"- `{row['variant']}` against `{besides['against']}`: {gain}")
    lines += [
        f"- `{row['variant']}`: `{' '.join(row['settings']) or 'as configured'}`" for row in rows
    ]
    lines += [f"- `{row['variant']}`: {note}" for row in rows for note in row["notes"]]
    return "\n".join(lines)


def _cells(row: Json, first: str, seeds: int) -> list[str]:
    ended = sum(run["failed"] is None for run in row["runs"])
    return [
        row["variant"],
        _pm(row["top1"], row["top1_sd"], ".2f"),
        "" if row["variant"] == first else _pm(row["gain"], row["gain_se"], "+.2f"),
        *(_number(row[key], ".0f") for key in ("train_seconds", "images_per_second")),
        f"{ended} of {seeds}{_failures(row)}",
    ]


def _paired(name: str, reference: str, results: Sequence[Result]) -> Json:
    """Top-1 minus that of the reference, in points, over runs of the same seeds."""
    mine, other = (
        {r.job.seed: r.summary["top1"] for r in results if r.job.variant.name == n and r.summary}
        for n in (name, reference)
    )
    gains = [mine[seed] - other[seed] for seed in mine if seed in other]
    sd = _sd(gains)
    error = None if sd is None else sd / len(gains) ** 0.5
    return {"gain": _mean(gains), "gain_se": error, "pairs": len(gains)}


def _run(result: Result) -> Json:
    found = {key: result.summary[key] for key in KEYS} if result.summary else {}
    folder = f"{result.job.folder.parent.name}/{result.job.folder.name}"
    failed = None if result.summary else result.reason
    return {"seed": result.job.seed, "folder": folder, "failed": failed, **found}


def _failures(row: Json) -> str:
    failed = [f"seed {r['seed']}: {r['failed']}" for r in row["runs"] if r["failed"] is not None]
    return "".join(f"; {text}" for text in failed).replace("|", "/")


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _pm(value: float | None, spread: float | None, how: str) -> str:
    return _number(value, how) + ("" if spread is None else f" ± {spread:.2f}")
