"""Measures the plan and the end of a pack of many images, without any: CPU time and memory.

A made listing is planned, receipts of its shards are made, and the pack is finished; nothing is
read or written of images. Each size is measured in a process of its own. The time of listing real
files comes on top.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.untrusted import json_value
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import ROOT
from tools.bench.plan_run import CLASSES, IMAGE
from tools.bench.results import Json, Row, last_line, spread

TINY = {"rows": [10_000], "rounds": 1}


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("plan", __doc__, arguments, measure, options, rounds=3, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    sizes = "numbers of images (%(default)s)"
    add("--rows", type=at_least(CLASSES), nargs="+", default=[100_000, 1_000_000], help=sizes)
    add("--work", type=Path, default=Path(tempfile.gettempdir()), help="250 bytes an image")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Every size in turn."""
    report.claim = (
        f"median of at most {options.rounds} interleaved rounds; CPU time, user and system, of one "
        f"process; {IMAGE} bytes an image, shards of 1 GiB, 10 % of the images labeled"
    )
    variants = {f"{rows} images": rows for rows in options.rows}

    def timer(name: str) -> Json:
        if name in report.failed:
            return {}
        command = [sys.executable, "-m", "tools.bench.plan_run", str(variants[name])]
        done = subprocess.run(
            [*command, str(options.work)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            report.fail(name, last_line(done.stderr))
            return {}
        found: Json = json_value(last_line(done.stdout))
        return found

    turns = report.interleaved({name: name for name in variants}, timer, warmup=0)
    for name, found in turns.items():
        if name in report.failed:
            continue
        made = [
            Row(f"{name}: {part}", spread([one[part] for one in found]), "us/image")
            for part in ("plan", "finish", "both")
        ]
        made[-1] = made[-1]._replace(target=15.0)
        peaks = spread([one["peak_mib"] for one in found])
        report.add([*made, Row(f"{name}: memory", peaks, "MiB")])
