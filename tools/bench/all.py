"""Runs every benchmark that this machine can run, the most important first, and stops in time.

Each is a process of its own with a share of the time, ended when that is over; what it does not use
goes to those behind it. OUT gets NAME.json and NAME.log of each, and summary.md: all tables, how
each ended, and what was left out. That page is written anew after each. `--smoke` is passed on.
Exit code 1: a benchmark failed or was ended.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mpl_fast import atomic
from mpl_fast.errors import INTERRUPTED, ConfigError, DataError, UserError, output_errors
from mpl_fast.untrusted import json_object
from tools.bench.jobs import Ended, chosen, run, tail
from tools.bench.results import FORM, Json, table

MARGIN = 5.0  # seconds before the end by which everything is done
MEASURING = 0.75  # of a benchmark's time, as its --minutes; the remainder is for imports
SHORTEST = 10.0  # seconds in which no benchmark gets anywhere


class Job(NamedTuple):
    """A module with options; `share` is of the time, about its seconds on a GPU."""

    name: str
    module: tuple[str, ...]
    share: float


def main(arguments: Sequence[str]) -> int:
    """Job after job."""
    began = time.monotonic()
    options = _options(arguments)
    try:
        waiting, left_out = _plan(options)
        with output_errors(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"tools.bench all: error: {error}", file=sys.stderr)
        return 2
    ended: list[Ended] = []
    code = 0
    try:
        for job, limit in _turns(waiting, began + 60.0 * options.minutes - MARGIN, left_out):
            print(f"{job.name}, at most {limit:.0f} s", flush=True)
            (options.out / f"{job.name}.json").unlink(missing_ok=True)  # of an earlier run
            ended.append(run(job.name, command(job, limit, options), options.out, limit))
            print(f"  {ended[-1].how} ({ended[-1].seconds:.0f} s)", flush=True)
            _write(options, ended, left_out)
    except KeyboardInterrupt:
        left_out.append("interrupted: what is not in the table")
        code = INTERRUPTED
    _write(options, ended, left_out)
    return code or int(not all(one.well for one in ended))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    description = " ".join((__doc__ or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(
        "python -m tools.bench all", allow_abbrev=False, description=description
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="(%(default)s)")
    add("--minutes", type=float, default=9.0, metavar="M", help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--rec", metavar="DIR", help="records that make_rec.py packed, for `input`")
    add("--only", nargs="+", default=[""], metavar="NAME", help="benchmarks that begin with this")
    add("--commit", metavar="NAME", help="the code's commit, where there is no git")
    add("--smoke", action="store_true", help="everything once, tiny: no number is a claim")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> tuple[list[Job], list[str]]:
    if options.minutes <= 0:
        raise ConfigError(f"--minutes {options.minutes:g}: take more than 0")
    if options.rec and not (Path(options.rec) / "manifest.json").exists():
        raise DataError(f"--rec {options.rec} has no manifest.json: pack it with tools/make_rec.py")
    rec = str(Path(options.rec).resolve()) if options.rec else None
    options.out = options.out.resolve()  # the benchmarks run in the repository's root
    found, left_out = jobs(gpu=_gpu(options.device), smoke=options.smoke, rec=rec)
    names = chosen([job.name for job in found], options.only, others=["input"])
    return [job for job in found if job.name in names], left_out


def jobs(*, gpu: bool, smoke: bool, rec: str | None) -> tuple[list[Job], list[str]]:
    """Everything that can run here, the most important first, and why others cannot.

    `pack` is not among them: it measures disks, with peers to install first.
    """
    device, left_out = ("--device", "cuda" if gpu else "cpu"), []
    if smoke or not gpu:
        made = [_bench("step", 90.0 if smoke else 300.0, *device)]
    else:
        # In float32 and NCHW so many images of 224 pixels just fit into 80 GB.
        large = ("--model", "resnet50", "--labeled", "32")
        made = [
            _bench("step", 150.0, *device, "--model", "wrn_28_2", job="step_wrn_28_2"),
            _bench("step", 170.0, *device, *large, job="step_resnet50"),
        ]
    made.append(_bench("backbone", 70.0, *device, *(() if gpu else ("--models", "wrn_28_2"))))
    # Without a GPU it counts and compares, and times nothing.
    made.append(_bench("losses", 50.0, *(() if gpu or smoke else ("--smoke",))))
    if rec or smoke:
        threads = ("--threads", str(len(os.sched_getaffinity(0))))
        made.append(_bench("input", 60.0, *device, *threads, *(("--rec", rec) if rec else ())))
    else:
        left_out.append("input: it reads records, which --rec names")
    others = {"syncs": 30.0, "optimizer": 20.0, "derivative": 20.0, "checkpoint": 25.0}
    others |= {"startup": 40.0, "ranks": 20.0}
    return made + [_bench(name, share, *device) for name, share in others.items()], left_out


def _bench(name: str, share: float, *options: str, job: str = "") -> Job:
    return Job(job or name, ("tools.bench", name, *options), share)


def command(job: Job, seconds: float, options: argparse.Namespace) -> list[str]:
    """What is run: where a benchmark writes, and how long it may measure, included."""
    given = [sys.executable, "-m", *job.module, "--out", str(options.out / f"{job.name}.json")]
    minutes = f"{MEASURING * seconds / 60.0:.3f}"
    given += ["--smoke"] if options.smoke else ["--minutes", minutes]
    return given + (["--commit", options.commit] if options.commit else [])


def _turns(
    waiting: Sequence[Job], deadline: float, left_out: list[str]
) -> Iterator[tuple[Job, float]]:
    """Each job and its share of the seconds left: what one does not use goes to those behind it."""
    for number, job in enumerate(waiting):
        left = deadline - time.monotonic()
        limit = left * job.share / sum(other.share for other in waiting[number:])
        if limit < SHORTEST:
            left_out.append(f"{job.name}: no time")
        else:
            yield job, limit


def _gpu(device: str) -> bool:
    """Imports torch only here, so that a wrong option is an error at once."""
    if device == "cpu":
        return False
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu, or auto")
    return torch.cuda.is_available()


def _write(options: argparse.Namespace, ended: list[Ended], left_out: list[str]) -> None:
    text = page(options.out, ended, left_out, smoke=options.smoke)
    atomic.write_text(options.out / "summary.md", text)


def page(out: Path, ended: Sequence[Ended], left_out: Sequence[str], *, smoke: bool) -> str:
    """Markdown, out of what the jobs have written in `out`."""
    parts = ["# Benchmarks", *(["A smoke test: no number here is a claim."] if smoke else [])]
    lines = ["| benchmark | how it ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.how} | {one.seconds:.0f} |" for one in ended]
    parts += ["\n".join(lines), *_left_out(left_out)]
    for one in ended:
        found = bench_json(out, one.name)
        parts.append(f"## {one.name}")
        if found:
            parts += [str(found["claim"]), table(found["rows"]), *_left_out(found["skipped"])]
            parts.append("\n".join(f"- {key}: {value}" for key, value in found["machine"].items()))
        if not (one.well and found):
            printed = tail(out / f"{one.name}.log")
            parts.append(f"The end of its log:\n\n```\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def _left_out(lines: Sequence[str]) -> list[str]:
    return ["Left out:\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def bench_json(out: Path, name: str) -> Json:
    """What a job has written; empty, if it wrote nothing whole."""
    found = json_object(out / f"{name}.json")
    return found if found.get("form") == FORM else {}
