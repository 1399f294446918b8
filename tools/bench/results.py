"""The form of every benchmark's result: rows, JSON and the Markdown table. Needs no PyTorch."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

Json = dict[str, Any]
FORM = "mpl_fast.bench/1"


class Spread(NamedTuple):
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float
    n: int


class Row(NamedTuple):
    """One measured thing; `name` and `unit` are its key when two results are compared.

    `steady`: the number does not depend on what else the machine did (a ratio within one run, or a
    count). `limit`: the best that the hardware allows, in the same unit. `target`: the project's
    aim, in the same unit.
    """

    name: str
    found: Spread
    unit: str
    better: str = "lower"  # or "higher"
    steady: bool = False
    limit: float | None = None
    target: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Median, extremes and number of values."""
    return Spread(median(values), min(values), max(values), len(values))


def ratios(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> Spread:
    """How many times faster `fast` was than `slow`, round by round."""
    return spread([s / f for s, f in zip(seconds[slow], seconds[fast], strict=True)])


def count_row(
    name: str, value: float, unit: str, *, limit: float | None = None, target: float | None = None
) -> Row:
    """A row of one exact number, of which less is better."""
    return Row(name, spread([value]), unit, steady=True, limit=limit, target=target)


def row_json(row: Row) -> Json:
    """A row as it is written, with its share of the limit and whether its target is met."""
    found = {**row._asdict(), **row.found._asdict()}
    del found["found"]
    higher, value = row.better == "higher", row.found.median
    if row.limit is not None:
        found["share_of_limit"] = _share(*((value, row.limit) if higher else (row.limit, value)))
    if row.target is not None:
        found["met"] = value >= row.target if higher else value <= row.target
    return found


def last_line(printed: str) -> str:
    """Of what a process printed."""
    return (printed.strip().splitlines() or ["no output"])[-1]


def table(rows: Sequence[Json]) -> str:
    """Markdown of written rows: median and range, share of the limit, target."""
    lines = ["| | median (lowest to highest) | n | share of limit | target |"]
    lines.append("| --- | --- | --- | --- | --- |")
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An error's type and first words, in one line that is not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _share(part: float, whole: float) -> float | None:
    """1 for 0 of 0, such as syncs where none are allowed; of 0 nothing else is a share."""
    if part == whole:
        return 1.0
    return part / whole if whole else None


def _cells(row: Json) -> list[str]:
    number, unit = _number, row["unit"]
    middle = f"{number(row['median'])} {unit} ({number(row['low'])} to {number(row['high'])})"
    share = row.get("share_of_limit")
    percent = "" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
    sign = "≥" if row["better"] == "higher" else "≤"
    met = {True: "met", False: "**missed**"}.get(row.get("met", ""), "")
    target = f"{sign} {number(row['target'])}: {met}" if row["target"] is not None else ""
    return [row["name"], middle, str(row["n"]), percent, target]


def _number(value: float) -> str:
    whole = math.isfinite(value) and value == int(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or whole else f"{value:.3g}"
