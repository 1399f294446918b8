"""What an ablation found: statistics over seeds, paired differences, and their table."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.ablate.plan import Variant, replace
from tools.ablate.running import Result

Json = dict[str, Any]


def summarize(variants: Sequence[Variant], results: Sequence[Result]) -> list[Json]:
    """A row for each variant: means over the runs that ended, and differences to the first variant,
    and to the one that it names, over the seeds that ended with both."""
    rows = []
    for variant in variants:
        mine = [r for r in results if r.job.variant == variant]
        ended = [r.summary for r in mine if r.summary]
        top1 = [s["top1"] for s in ended]
        row: Json = {
            "variant": variant.name,
            "settings": list(variant.settings),
            "top1": _mean(top1),
            "top1_sd": _sd(top1),
            **_paired(variant.name, variants[0].name, results),
            "seconds": _mean([s["seconds"] for s in ended]),
            "images_per_second": _mean([s["images_per_second"] for s in ended]),
        }
        if variant.against:
            told = _paired(variant.name, variant.against, results)
            row["besides"] = {"against": variant.against, **told}
        notes = [w for r in mine for w in r.warnings if "never moves" in w]
        row["notes"] = list(dict.fromkeys(notes))  # each once: seeds share them
        rows.append({**row, "runs": [_run(r) for r in mine]})
    return rows


def _paired(name: str, reference: str, results: Sequence[Result]) -> Json:
    """How much better than the reference, in points, over runs of the same seeds."""
    mine, theirs = _top1(name, results), _top1(reference, results)
    gains = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return {"gain": _mean(gains), "gain_se": _standard_error(gains), "pairs": len(gains)}


def write(out: Path, rows: Sequence[Json], config: str, asked: int) -> str:
    """Writes ablation.json and ablation.md, each as a whole; returns the latter."""
    text = table(rows, asked)
    head = f"# Ablation of {config}\n\n"
    replace(out / "ablation.json", json.dumps({"config": config, "variants": rows}, indent=1))
    replace(out / "ablation.md", head + text + "\n")
    return text


def table(rows: Sequence[Json], asked: int) -> str:
    """Markdown; `asked` is the number of seeds."""
    first = rows[0]["variant"]
    lines = [
        f"Top-1 of the last evaluation (averaged weights), mean ± standard deviation over {asked} "
        f"seed(s); differences to `{first}` are between runs of one seed, mean ± standard error.",
        "",
        f"| variant | top-1 (%) | against `{first}` | seconds of training | images/s | runs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ended = sum(run["failed"] is None for run in row["runs"])
        gain = "" if row["variant"] == first else _pm(row["gain"], row["gain_se"], "+.2f")
        lines.append(
            f"| {row['variant']} | {_pm(row['top1'], row['top1_sd'], '.2f')} | {gain} | "
            f"{_number(row['seconds'], '.0f')} | {_number(row['images_per_second'], '.0f')} | "
            f"{ended} of {asked}{_failures(row)} |"
        )
    lines.append("")
    for row in rows:
        if besides := row.get("besides"):
            gain = _pm(besides["gain"], besides["gain_se"], "+.2f")
            lines.append(f"- `{row['variant']}` against `{besides['against']}`: {gain}")
    lines += [
        f"- `{row['variant']}`: `{' '.join(row['settings']) or 'as configured'}`" for row in rows
    ]
    lines += [f"- `{row['variant']}`: {note}" for row in rows for note in row["notes"]]
    return "\n".join(lines)


def _failures(row: Json) -> str:
    failed = [f"seed {r['seed']}: {r['failed']}" for r in row["runs"] if r["failed"] is not None]
    return "".join(f"; {text}" for text in failed).replace("|", "/")


def _run(result: Result) -> Json:
    keys = ("top1", "top5", "steps", "seconds", "images_per_second")
    found = {key: result.summary[key] for key in keys} if result.summary else {}
    place = f"{result.job.folder.parent.name}/{result.job.folder.name}"
    failed = None if result.summary else result.reason
    return {"seed": result.job.seed, "folder": place, "failed": failed, **found}


def _top1(name: str, results: Sequence[Result]) -> dict[int, float]:
    mine = [r for r in results if r.job.variant.name == name]
    return {r.job.seed: r.summary["top1"] for r in mine if r.summary}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _pm(value: float | None, spread: float | None, how: str) -> str:
    return _number(value, how) + ("" if spread is None else f" ± {spread:.2f}")
