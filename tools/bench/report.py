"""One form for the result of every benchmark: a JSON file that `compare.py` reads, and a table."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.errors import output_errors
from tools.bench.clock import Spread
from tools.bench.form import FORM
from tools.bench.machine import describe

Json = dict[str, Any]


class Row(NamedTuple):
    """One measured thing; `name` is its key when two results are compared.

    `steady` says that the number does not depend on what else the machine did: a ratio within one
    run, or a count. `limit` is the best that the hardware allows, in the same unit, if it is known;
    `target` what the project wants of it.
    """

    name: str
    found: Spread
    unit: str
    better: str = "lower"  # or "higher"
    steady: bool = False
    limit: float | None = None
    target: float | None = None


def add_options(parser: argparse.ArgumentParser, bench: str, rounds: int) -> None:
    """What every benchmark script accepts."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(f"runs/{bench}.json"), help="JSON file (%(default)s)")
    add("--rounds", type=int, default=rounds, metavar="N", help="(%(default)s)")
    add("--minutes", type=float, metavar="M", help="begin no further round after so long")
    add("--seed", type=int, default=0, metavar="N", help="of the order of measuring (%(default)s)")
    add("--commit", metavar="NAME", help="where there is no git to ask")
    add("--smoke", action="store_true", help="everything once, tiny: no number is a claim")


def result(bench: str, options: argparse.Namespace, claim: str, rows: Sequence[Row]) -> Json:
    """What is written; `claim` says in a sentence what the numbers are."""
    claim = "a smoke test: no number here is a claim" if options.smoke else claim
    return {
        "form": FORM,
        "bench": bench,
        "claim": claim,
        "machine": describe(options.commit),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "rows": [_row(row) for row in rows],
    }


def prepare(out: Path) -> None:
    """Raises `OutputError` before a long measurement if its result could not be written."""
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(None, "is a folder: name a file", str(out))
        aside = _aside(out)
        aside.touch()
        aside.unlink()


def write(found: Json, out: Path) -> None:
    """Aside, synced and renamed, so that a file is whole or not there. May raise `OutputError`."""
    text, aside = json.dumps(found, indent=1) + "\n", _aside(out)
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)


def publish(found: Json, out: Path) -> None:
    """Writes a whole result, and prints what it is and its table."""
    write(found, out)
    print(found["claim"])
    print(table(found["rows"]))
    print(f"written: {out}")


def table(rows: Sequence[Json]) -> str:
    """Markdown, with the share of the limit and whether the target is met, where there are any."""
    lines = ["| | median (lowest to highest) | n | share of limit | target |"]
    lines.append("| --- | --- | --- | --- | --- |")
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.writing")


def _row(row: Row) -> Json:
    found = {**row._asdict(), **row.found._asdict()}
    del found["found"]
    higher, value = row.better == "higher", row.found.median
    if row.limit is not None:
        found["share_of_limit"] = _share(*((value, row.limit) if higher else (row.limit, value)))
    if row.target is not None:
        found["met"] = value >= row.target if higher else value <= row.target
    return found


def _share(part: float, whole: float) -> float | None:
    """1 for 0 of 0, such as syncs where none are allowed; of 0 nothing else is a share."""
    if part == whole:
        return 1.0
    return part / whole if whole else None


def _cells(row: Json) -> list[str]:
    number, unit = _number, row["unit"]
    middle = f"{number(row['median'])} {unit} ({number(row['low'])} to {number(row['high'])})"
    share = row.get("share_of_limit")
    sign = "≥" if row["better"] == "higher" else "≤"
    met = {True: "met", False: "**missed**"}.get(row.get("met", ""), "")
    target = f"{sign} {number(row['target'])}: {met}" if row["target"] is not None else ""
    return [row["name"], middle, str(row["n"]), _percent(share), target]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def _number(value: float) -> str:
    whole = math.isfinite(value) and value == int(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or whole else f"{value:.3g}"
