"""Cases of a campaign: each finished one is a line of a file, so that a second call goes on."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpl_fast.atomic import write_json
from mpl_fast.errors import DataError, printable
from mpl_fast.training.environment import environment
from mpl_fast.untrusted import json_value

MEASURED = ("elastic", "soak")  # kinds whose numbers are in result.json


@dataclass(frozen=True)
class Case:
    """How a case ended."""

    name: str
    kind: str  # one of KINDS in __main__.py
    outcome: str  # passed, failed, or skipped: what it needs is not here, or its time was over
    seconds: float = 0.0
    kills: int = 0
    reason: str = ""  # why it failed or was skipped
    about: dict[str, Any] = field(default_factory=dict)


class Campaign:
    """The cases in a folder. Cases that are there already are not run again."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out = out
        self._file = out / "cases.jsonl"
        self._ends = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.cases = read_cases(self._file)

    @property
    def time_is_over(self) -> bool:
        """Whether no other case is begun; one that has begun is ended."""
        return time.monotonic() > self._ends

    def kills(self, kind: str) -> int:
        """SIGKILLs of this kind of case so far."""
        return sum(case.kills for case in self.cases.values() if case.kind == kind)

    def run(self, name: str, run: Callable[[], Case]) -> Case | None:
        """Runs a case and stores it, unless it is stored or the time is over."""
        if name in self.cases or self.time_is_over:
            return self.cases.get(name)
        case = run()
        self.add(case)
        return case

    def add(self, case: Case) -> None:
        """Stores a case at once, and prints a line."""
        self.cases[case.name] = case
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(case)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        why = f": {case.reason}" if case.reason else ""
        print(printable(f"{case.outcome} {case.name} ({case.seconds:.0f} s){why}"), flush=True)

    def result(self) -> dict[str, Any]:
        """Writes and returns result.json: counts by kind, and every case that failed."""
        result = {
            "environment": environment(),
            "counts": counts(self.cases.values()),
            "failed": [asdict(case) for case in self.cases.values() if case.outcome == "failed"],
            "measured": {c.name: c.about for c in self.cases.values() if c.kind in MEASURED},
        }
        write_json(self.out / "result.json", result)
        return result


def read_cases(file: Path) -> dict[str, Case]:
    """Stored cases by name; a line that a kill has cut short is left out."""
    found = {}
    text = file.read_text("utf-8", "surrogateescape") if file.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, "utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            case = Case(**json_value(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}:{number} is damaged: remove the line ({error})") from None
        found[case.name] = case
    return found


def counts(cases: Iterable[Case]) -> dict[str, dict[str, int]]:
    """By kind: cases, how they ended, and SIGKILLs."""
    found: dict[str, Counter[str]] = {}
    for case in cases:
        of_kind = found.setdefault(case.kind, Counter(passed=0, failed=0, skipped=0, kills=0))
        of_kind[case.outcome] += 1
        of_kind["kills"] += case.kills
    return {kind: dict(counted) for kind, counted in found.items()}
