"""Named faults: the rows of docs/reliability.md, each with a test that injects the fault."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from tests.tiny_run import ROOT, environment
from tools.faults.cases import Campaign, Case
from tools.faults.processes import ended, started

DOCUMENT = ROOT / "docs" / "reliability.md"
TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")
LIMIT = 3600.0  # seconds of the tests of one file


def faults(document: Path = DOCUMENT) -> dict[str, str]:
    """Faults and their tests: first and last cells of the tables' rows."""
    found = {}
    for line in document.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and (test := TEST.fullmatch(cells[-1])):
            found[cells[0]] = test[1]
    return found


def run_named(campaign: Campaign, only: Sequence[str]) -> None:
    """The faults, or those of `only`, file by file: a process for each takes seconds to start."""
    known = faults()
    by_file: dict[str, list[str]] = {}
    for name, test in known.items():
        if (not only or name in only) and name not in campaign.cases:
            by_file.setdefault(test.partition("::")[0], []).append(name)
    for names in by_file.values():
        if not campaign.time_is_over:
            for case in tested(campaign.out, {name: known[name] for name in names}):
                campaign.add(case)


def tested(out: Path, tests: Mapping[str, str]) -> list[Case]:
    """Runs tests of one file, by the names of their faults."""
    began, report, log = time.monotonic(), out / "pytest.xml", out / "pytest.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={report}"]
    command += [f"--rootdir={ROOT}", *(str(ROOT / test) for test in tests.values())]
    code = ended(started(command, log, environment()), LIMIT)
    if code not in (0, 1) or not report.exists():
        make = partial(Case, kind="faults", outcome="failed", seconds=time.monotonic() - began)
        return [make(name, reason=f"pytest ended with {code}: see {log}") for name in tests]
    items = [*ElementTree.parse(report).iter("testcase")]
    return [_case(name, test, items) for name, test in tests.items()]


def _case(name: str, test: str, items: Sequence[ElementTree.Element]) -> Case:
    """How the test of a fault ended, with all of its parameters."""
    wanted = test.partition("::")[2]
    own = [item for item in items if item.get("name", "").partition("[")[0] == wanted]
    ways = [child.tag for item in own for child in item]
    failed = sum(way in ("failure", "error") for way in ways)
    seconds = sum(float(item.get("time", 0)) for item in own)
    make = partial(Case, name, "faults", seconds=seconds, about={"test": test})
    if failed or not own:
        return make("failed", reason=f"{failed} of {len(own)} tests failed" if own else "no test")
    if ways.count("skipped") == len(own):
        return make("skipped", reason="all its tests are skipped here")
    return make("passed")
