"""Compares two results of the same benchmark, or two folders of them, and fails on a regression.

Rows are matched by name and unit. One that is steady, a count or a ratio within one run, is gated
if both runs had the same settings; a time or a rate only if they had the same machine, too, and
were no smoke tests. A change counts if it is beyond the tolerance and the ranges from lowest to
highest do not overlap. A gated row that is missing fails as well. Exit code 1: a regression; 2:
something cannot be compared.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.errors import ConfigError, DataError, UserError
from tools.bench.results import FORM, Json

MACHINE = ("cpu", "gpu", "cores")
VALUES = ("median", "low", "high")
ROW = ("name", "unit", "better", "steady", *VALUES)
NOT_MEASURED = ("out", "commit", "rounds", "minutes", "seed")  # of the settings


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
    parser = argparse.ArgumentParser("python -m tools.bench compare", description=description)
    add = parser.add_argument
    add("old", type=Path, help="JSON file of a benchmark, or a folder of them")
    add("new", type=Path, help="one of the same kind")
    add("--tolerance", default="5%", metavar="SHARE", help="5%% or 0.05 (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        tolerance = _tolerance(options.tolerance)
        failures = sum(_print(*pair, tolerance) for pair in _pairs(options.old, options.new))
    except UserError as error:
        print(f"tools.bench compare: {error}", file=sys.stderr)
        return 2
    print(f"rows that fail: {failures}" if failures else "no regression")
    return int(failures > 0)


def compared(old: Json, new: Json, tolerance: float) -> list[Change]:
    """The rows of both results, in the order of the old one; then the new ones."""
    alike = not other_settings(old, new)
    timed = alike and not differences(old, new)
    before, after = _rows(old), _rows(new)
    found = [
        _change(row, after.get(key), tolerance, gated=timed or (alike and row["steady"]))
        for key, row in before.items()
    ]
    return found + [_appeared(row) for key, row in after.items() if key not in before]


def other_settings(old: Json, new: Json) -> list[str]:
    """Why nothing can be compared: what was measured is not the same."""
    settings = {**old["settings"], **new["settings"]}
    return [
        f"--{key.replace('_', '-')}: {old['settings'].get(key)} and {new['settings'].get(key)}"
        for key in settings
        if key not in NOT_MEASURED and old["settings"].get(key) != new["settings"].get(key)
    ]


def differences(old: Json, new: Json) -> list[str]:
    """Why times cannot be compared; empty if they can."""
    found = [
        f"{key}: {old['machine'].get(key)} and {new['machine'].get(key)}"
        for key in MACHINE
        if old["machine"].get(key) != new["machine"].get(key)
    ]
    found += other_settings(old, new)
    smoke = any(one["settings"].get("smoke") == "True" for one in (old, new))
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


def _appeared(row: Json) -> Change:
    return Change(row["name"], row["unit"], None, row["median"], None, "new")


def _print(name: str, old: Json, new: Json | None, tolerance: float) -> int:
    """The table of one benchmark; returns how many rows fail."""
    print(f"## {name}\n")
    if new is None:
        print("The new folder has no such file: its steady rows are missing.\n")
        new = {**old, "machine": {}, "rows": []}
    elif why := other_settings(old, new):
        print(f"NOTHING is gated, for these are two things: {'; '.join(why)}.\n")
    elif why := differences(old, new):
        print(f"Times and rates are not gated: {'; '.join(why)}.\n")
    changes = compared(old, new, tolerance)
    print("| | old | new | better by | |\n| --- | --- | --- | --- | --- |")
    for change in changes:
        values = ["" if v is None else f"{v:,.4g} {change.unit}" for v in change[2:4]]
        share = "" if change.share is None else f"{100 * change.share:+.1f} %"
        print(f"| {' | '.join([change.name, *values, share, change.verdict])} |")
    print()
    return sum(change.fails for change in changes)


def _pairs(old: Path, new: Path) -> list[tuple[str, Json, Json | None]]:
    """Names and both results; of folders, all that the old one has."""
    for path in (old, new):
        if not path.exists():
            raise DataError(f"there is no {path}; name a JSON file that a benchmark wrote")
    if old.is_dir() != new.is_dir():
        raise DataError(f"{old} and {new}: name two files, or two folders")
    if not old.is_dir():
        first = _read(old)
        return [(new.name, first, _same(first, _read(new), new))]
    before, after = _folder(old), _folder(new)
    if not before.keys() & after.keys():
        raise DataError(f"{old} and {new} have no result of a benchmark under the same name")
    for name in after.keys() - before.keys():
        print(f"{new / name} is new: there is nothing to compare it with")
    return [
        (name, one, _same(one, after[name], new / name) if name in after else None)
        for name, one in before.items()
    ]


def _same(old: Json, new: Json, path: Path) -> Json:
    if old["bench"] != new["bench"]:
        raise DataError(f"{path} is of {new['bench']}, the old result of {old['bench']}")
    return new


def _folder(folder: Path) -> dict[str, Json]:
    """Its results by name; other JSON files are skipped."""
    found = {path.name: _load(path) for path in sorted(folder.glob("*.json"))}
    return {
        name: _checked(result, folder / name)
        for name, result in found.items()
        if isinstance(result, dict) and result.get("form") == FORM
    }


def _read(path: Path) -> Json:
    loaded = _load(path)
    if not isinstance(loaded, dict) or loaded.get("form") != FORM:
        raise DataError(f"{path} is no result of a benchmark: it has no form {FORM}")
    return _checked(loaded, path)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as JSON ({reason}); measure again") from error


def _checked(result: Json, path: Path) -> Json:
    if fault := _fault(result):
        raise DataError(f"{path} is damaged: {fault}; measure again")
    return result


def _fault(result: Json) -> str:
    parts = {"bench": str, "machine": dict, "settings": dict, "rows": list}
    for name, kind in parts.items():
        if not isinstance(result.get(name), kind):
            return f"it has no {name}"
    for row in result["rows"]:
        if not isinstance(row, dict) or set(ROW) - row.keys():
            return "a row lacks a part"
        if not all(isinstance(row[key], float | int) and math.isfinite(row[key]) for key in VALUES):
            return f"row {row['name']!r} has no finite number"
    names = [(row["name"], row["unit"]) for row in result["rows"]]
    twice = [name for name, unit in names if names.count((name, unit)) > 1]
    return f"it has two rows {twice[0]!r}" if twice else ""


def _rows(result: Json) -> dict[tuple[str, str], Json]:
    return {(row["name"], row["unit"]): row for row in result["rows"]}


def _tolerance(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ConfigError(f"--tolerance {text}: write a share such as 5% or 0.05")
    return value
