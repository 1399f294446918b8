"""One page about all benchmarks of a run: how each ended, its table, and what was left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.form import FORM
from tools.bench.report import table
from tools.bench_steps.running import Ended

Json = dict[str, Any]
NAME = "summary.md"
TAIL = 12  # lines of a log that are shown if a job failed


def page(out: Path, ended: Sequence[Ended], left_out: Sequence[str], *, smoke: bool) -> str:
    """Markdown, out of what the jobs have written in `out`."""
    parts = ["# Benchmarks"]
    if smoke:
        parts.append("A smoke test: no number here is a claim.")
    parts.append(_overview(ended))
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in left_out))
    machine = next((m for one in ended if (m := _json(out, one.name).get("machine"))), None)
    if machine:
        parts.append("\n".join(f"- {key}: {value}" for key, value in machine.items()))
    parts += [_section(out, one) for one in ended]
    return "\n\n".join(parts) + "\n"


def _overview(ended: Sequence[Ended]) -> str:
    lines = ["| benchmark | how it ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.how} | {one.seconds:.0f} |" for one in ended]
    return "\n".join(lines)


def _section(out: Path, one: Ended) -> str:
    found, log = _json(out, one.name), out / f"{one.name}.log"
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    parts = [f"## {one.name}", f"{one.how} ({one.seconds:.0f} s)"]
    if claim := found.get("claim"):
        parts.append(str(claim))
    parts.append(_tables(out, one.name, found, said))
    skipped = [str(line) for line in found.get("skipped", [])]
    if skipped:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in skipped))
    if not one.well or not found:
        parts.append("The end of its log:\n\n```\n" + "\n".join(said[-TAIL:]) + "\n```")
    return "\n\n".join(part for part in parts if part)


def _tables(out: Path, name: str, found: Json, said: Sequence[str]) -> str:
    """From its file; or else from its own page, or from what it has printed."""
    if found.get("form") == FORM:
        return table(found["rows"])
    own = out / f"{name}.md"
    if own.exists():
        return own.read_text().strip()
    return "\n".join(line for line in said if line.startswith("|"))


def _json(out: Path, name: str) -> Json:
    """What a job has written; nothing, if it did not come to that."""
    try:
        found = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
