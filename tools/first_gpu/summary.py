"""What became of the steps: statuses, key numbers, summary.json and a page of Markdown."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mpl_fast import atomic
from mpl_fast.training.curves import read_rows
from mpl_fast.untrusted import json_object
from tools.bench.all import bench_json
from tools.bench.jobs import tail
from tools.bench.results import Json, table

FORM = "mpl_fast.first_gpu_run/1"
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_REACHED, RUNNING, INTERRUPTED = "not reached", "running", "interrupted"
BAD = (FAILED, TIMED_OUT, INTERRUPTED)
ROWS, FAILURES = 12, 10  # lines of a benchmark, and of failed tests, on the page
WIDTH = 200  # characters of a line out of a log
PYTEST_END = re.compile(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected)\b.*) =+$")


class Outcome(NamedTuple):
    """Of one step; `code` and `seconds` are None before it has ended."""

    name: str
    status: str
    code: int | None = None
    seconds: float | None = None
    limit: float | None = None
    found: tuple[str, ...] = ()
    """Key results in words."""
    where: str = ""
    """The GPU and the commit."""


class Summary:
    """The outcome of every step, in the folder `out`; `save` writes all of it."""

    def __init__(self, out: Path, names: Sequence[str], left_out: Sequence[str]) -> None:
        self._out, self._left_out = out, left_out
        machine = json_object(out / "env.json")
        self.where = f"{machine.get('gpu')}, commit {machine.get('commit')}"
        self.outcomes = read(out)
        for name in names:
            self.outcomes.setdefault(name, Outcome(name, NOT_REACHED))
        self.interrupt()  # by a SIGKILL of the call before

    def set(self, outcome: Outcome) -> None:
        """Takes an outcome and writes all files."""
        self.outcomes[outcome.name] = outcome._replace(where=self.where)
        self.save()

    def interrupt(self) -> None:
        """What was running no longer does."""
        for name, one in self.outcomes.items():
            if one.status == RUNNING:
                self.outcomes[name] = one._replace(status=INTERRUPTED)

    def bad(self, names: Sequence[str]) -> list[str]:
        """Those of some steps that have not passed although they were run."""
        return [name for name in names if self.outcomes[name].status in BAD]

    def save(self) -> None:
        """Writes summary.json and summary.md."""
        steps = [one._asdict() for one in self.outcomes.values()]
        found = {"form": FORM, "steps": steps, "left_out": [*self._left_out]}
        atomic.write_json(self._out / "summary.json", found)
        atomic.write_text(self._out / "summary.md", self.page())

    def page(self) -> str:
        """Markdown."""
        machine = json_object(self._out / "env.json")
        keys = ("gpu", "driver", "cuda", "clocks", "python", "versions", "commit", "missing")
        parts = ["# First run on a GPU"]
        parts += ["\n".join(f"- {key}: {machine[key]}" for key in keys if key in machine)]
        lines = ["| step | | seconds | of at most | found |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(self._cells(one))} |" for one in self.outcomes.values()]
        parts.append("\n".join(lines))
        if self._left_out:
            parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in self._left_out))
        for name, one in self.outcomes.items():
            if one.status in (NOT_REACHED, RUNNING):
                continue
            bench = bench_json(self._out, name)
            if bench:
                parts += [f"## {name}", str(bench["claim"]), table(key_rows(bench["rows"]))]
                parts += [f"- FAILED: {n}: {why}" for n, why in bench["failed"].items()]
            if one.status in BAD:
                parts.append(
                    f"The end of {name}.log:\n\n```\n{tail(self._out / f'{name}.log')}\n```"
                )
        return "\n\n".join(parts) + "\n"

    def _cells(self, one: Outcome) -> list[str]:
        status = one.status if one.status == PASSED else f"**{one.status}**"
        if one.code and one.status == FAILED:
            status += f", code {one.code}" if one.code > 0 else f" by signal {-one.code}"
        numbers = ["" if x is None else f"{x:.0f}" for x in (one.seconds, one.limit)]
        elsewhere = [f"on {one.where}"] if one.where not in ("", self.where) else []
        words = "<br>".join((*elsewhere, *one.found)).replace("|", "\\|")
        return [one.name, status, *numbers, words]


def read(out: Path) -> dict[str, Outcome]:
    """The outcomes that an earlier call has left in a folder, by step."""
    found = json_object(out / "summary.json")
    if found.get("form") != FORM:
        return {}
    try:
        made = [Outcome(**{**one, "found": tuple(one["found"])}) for one in found["steps"]]
    except (KeyError, TypeError):
        return {}  # damaged: all steps are run again
    return {one.name: one for one in made}


def key_rows(rows: Sequence[Json]) -> list[Json]:
    """Of a benchmark the rows with a target, then ratios, then others, as many as fit."""

    def rank(row: Json) -> tuple[bool, bool, bool]:
        return row["target"] is None, row["unit"] not in ("x", "times"), ", phase: " in row["name"]

    return sorted(rows, key=rank)[:ROWS]


def found_by(name: str, out: Path) -> tuple[str, ...]:
    """Key results of a step that has ended, from its log or from the rows of its training."""
    if name == "train":
        return _of_training(out / "train" / "metrics.jsonl")
    lines = tail(out / f"{name}.log", 10_000).splitlines()
    wrong = dict.fromkeys(line[:WIDTH] for line in lines if line.startswith("FAILED: "))
    if wrong or bench_json(out, name):
        return (*wrong,)[:FAILURES]
    ends = [found[1] for line in lines if (found := PYTEST_END.match(line))]
    if ends:
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return (ends[-1], *(line[:WIDTH] for line in failed[:FAILURES]))
    crashed = [line for line in lines if "Fatal Python error" in line]
    return tuple(line[:WIDTH] for line in (*crashed[-1:], *lines[-1:]))


def _of_training(file: Path) -> tuple[str, ...]:
    """Rates and accuracies of the rows."""
    rows = read_rows(file) if file.exists() else []
    steps = [row for row in rows if "images_per_second" in row]
    found = [f"{len(steps)} rows up to step {steps[-1]['step']}"] if steps else ["no rows"]
    for key, unit in (("images_per_second", "images/s"), ("data_wait", "data wait")):
        # The first row has the compilation in it.
        if values := [float(row[key]) for row in steps[1:] if key in row]:
            found.append(f"{unit}: {median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
    for row in [row for row in rows if "eval/top1" in row][-3:]:
        found.append(f"top-1 {row['eval/top1']:.2f} % at step {row['step']}")
    return tuple(found)
