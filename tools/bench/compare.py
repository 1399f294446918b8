"""Compares two results of the same benchmark, or two folders of them, and fails on a regression.

Rows are matched by name and unit. With equal settings, steady rows (counts, ratios within one run)
are gated; times and rates only on equal machines and outside of smoke tests. A gated row fails if
it is missing, or worse by more than the tolerance with ranges that do not overlap. Exit code 1: a
regression; 2: something cannot be compared.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import ConfigError, DataError, UserError
from mpl_fast.training.curves import is_number
from mpl_fast.untrusted import json_value
from tools.bench.results import FORM, Json

MACHINE = ("cpu", "gpu", "cores")
VALUES = ("median", "low", "high")
ROW = {"name", "unit", "better", "steady", *VALUES}
PARTS = {"bench": str, "machine": dict, "settings": dict, "rows": list}
NOT_MEASURED = {"out", "commit", "rounds", "minutes", "seed"}  # of the settings
Key = tuple[str, str]  # file name, empty for a single file, and benchmark


class Change(NamedTuple):
    """Of one row; `share` is that of the old median, positive where the new one is better."""

    name: str
    unit: str
    old: float | None
    new: float | None
    share: float | None
    verdict: str
    fails: bool = False


def main(arguments: Sequence[str]) -> int:
    """Prints a table for each benchmark."""
    description = " ".join((__doc__ or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(
        "python -m tools.bench compare", allow_abbrev=False, description=description
    )
    add = parser.add_argument
    add("old", type=Path, help="JSON file of a benchmark, or a folder of them")
    add("new", type=Path, help="one of the same kind")
    add("--tolerance", default="5%", metavar="SHARE", help="5%% or 0.05 (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        tolerance = _tolerance(options.tolerance)
        old, new = _results(options.old), _results(options.new)
        if not old.keys() & new.keys():
            raise DataError(f"{options.old} and {options.new} have no result of the same benchmark")
    except UserError as error:
        print(f"tools.bench compare: error: {error}", file=sys.stderr)
        return 2
    failures = sum(_print(key, one, new.get(key), tolerance) for key, one in old.items())
    for name, bench in new.keys() - old.keys():
        print(f"{name or bench} is new: there is nothing to compare it with")
    print(f"rows that fail: {failures}" if failures else "no regression")
    return int(failures > 0)


def compared(old: Json, new: Json, tolerance: float) -> list[Change]:
    """The rows of both results, in the order of the old one; then the new ones."""
    alike = not other_settings(old, new)
    timed = alike and not other_conditions(old, new)
    before, after = ({(row["name"], row["unit"]): row for row in x["rows"]} for x in (old, new))
    found = [
        _change(row, after.get(key), tolerance, gated=timed or (alike and row["steady"]))
        for key, row in before.items()
    ]
    added = [row for key, row in after.items() if key not in before]
    return found + [Change(r["name"], r["unit"], None, r["median"], None, "new") for r in added]


def other_settings(old: Json, new: Json) -> list[str]:
    """Settings that differ: with one, nothing can be compared."""
    a, b = old["settings"], new["settings"]
    names = [key for key in {**a, **b} if key not in NOT_MEASURED and a.get(key) != b.get(key)]
    return [f"--{key.replace('_', '-')}: {a.get(key)} and {b.get(key)}" for key in names]


def other_conditions(old: Json, new: Json) -> list[str]:
    """Why times and rates cannot be compared although the settings are equal."""
    a, b = old["machine"], new["machine"]
    found = [f"{k}: {a.get(k)} and {b.get(k)}" for k in MACHINE if a.get(k) != b.get(k)]
    smoke = old["settings"].get("smoke") == "True"
    return [*found, "a smoke test's times are no claim"] if smoke else found


def gain(old: float, new: float, better: str) -> float:
    """By what share of the old value the new one is better; infinite where the old one is 0."""
    change = (new - old) / abs(old) if old else math.copysign(math.inf, new) if new else 0.0
    return change if better == "higher" else 0.0 - change


def _change(old: Json, new: Json | None, tolerance: float, *, gated: bool) -> Change:
    if new is None:
        verdict = "**missing**" if gated else "missing, not gated"
        return Change(old["name"], old["unit"], old["median"], None, None, verdict, gated)
    share = gain(old["median"], new["median"], old["better"])
    verdict, fails = "same", False
    if not gated:
        verdict = "not gated"
    elif abs(share) > tolerance:
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        fails = apart and share < 0
        verdict = ("**worse**" if fails else "better") if apart else "ranges overlap"
    return Change(old["name"], old["unit"], old["median"], new["median"], share, verdict, fails)


def _print(key: Key, old: Json, new: Json | None, tolerance: float) -> int:
    """The table of one benchmark; returns how many rows fail."""
    print(f"## {key[0] or key[1]}\n")
    if new is None:
        print("The new folder has no such file: its steady rows are missing.\n")
        new = {**old, "machine": {}, "rows": []}
    elif why := other_settings(old, new):
        print(f"NOTHING is gated: {'; '.join(why)}.\n")
    elif why := other_conditions(old, new):
        print(f"Times and rates are not gated: {'; '.join(why)}.\n")
    changes = compared(old, new, tolerance)
    print("| | old | new | better by | |\n| --- | --- | --- | --- | --- |")
    for change in changes:
        values = ["" if v is None else f"{v:,.4g} {change.unit}" for v in change[2:4]]
        share = "" if change.share is None else f"{100 * change.share:+.1f} %"
        print(f"| {' | '.join([change.name, *values, share, change.verdict])} |")
    print()
    return sum(change.fails for change in changes)


def _results(path: Path) -> dict[Key, Json]:
    """Of a file, or of every JSON file of a folder that has the form of a benchmark's result."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    found = dict[Key, Json]()
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            result = json_value(file.read_bytes())
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{file} cannot be read as JSON ({reason})") from error
        if isinstance(result, dict) and result.get("form") == FORM:
            if fault := _fault(result):
                raise DataError(f"{file} is damaged: {fault}; measure again")
            found[file.name if path.is_dir() else "", result["bench"]] = result
    return found


def _fault(result: Json) -> str:
    for name, kind in PARTS.items():
        if not isinstance(result.get(name), kind):
            return f"it has no {name}"
    names = set[Key]()
    for row in result["rows"]:
        if not isinstance(row, dict) or ROW - row.keys():
            return "a row lacks a part"
        if not all(isinstance(row[key], str) for key in ("name", "unit", "better")):
            return "a row has no name"
        if not all(is_number(row[key]) and math.isfinite(row[key]) for key in VALUES):
            return f"row {row['name']!r} has no finite number"
        if (row["name"], row["unit"]) in names:
            return f"it has two rows {row['name']!r}"
        names.add((row["name"], row["unit"]))
    return ""


def _tolerance(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ConfigError(f"--tolerance {text}: write a share such as 5% or 0.05")
    return value
