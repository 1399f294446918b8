"""Runs every benchmark that this machine can run, the most important first, and stops in time.

Each is a process of its own with a share of the time, ended when that is over; what it does not use
goes to those behind it. OUT gets NAME.json and NAME.log of each, and summary.md: all tables, how
each ended, and what was left out. That page is written anew after each. `--smoke` is passed on.
Exit code 1: a benchmark failed or was ended.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mpl_fast import atomic
from mpl_fast.errors import ConfigError, DataError, UserError, output_errors
from tools.bench.results import FORM, Json, table

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 9.0
MARGIN = 5.0  # seconds before the end by which everything is done
MEASURING = 0.75  # of a benchmark's time, as its --minutes; the remainder is for imports
SHORTEST = 10.0  # seconds in which no benchmark gets anywhere
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
INTERRUPTED = 130  # as shells have it after Ctrl-C
PAGE = "summary.md"
TAIL = 12  # lines of a log that are shown if a job failed
TESTS = ("tests/kernels/test_cuda.py", "tests/training/test_gpu_run.py")


class Job(NamedTuple):
    """A benchmark, or tests, with options; `share` is of the time, in any unit."""

    name: str
    command: tuple[str, ...]
    share: float
    result: bool = True  # whether it writes a JSON file


class Ended(NamedTuple):
    """How a job ended."""

    name: str
    code: int | None  # None: its time was over
    seconds: float

    @property
    def how(self) -> str:
        """In words."""
        if self.code is None:
            return "ended: its time was over"
        return "done" if self.code == 0 else f"failed with code {self.code}"


def main(arguments: Sequence[str]) -> int:
    """Job after job."""
    began = time.monotonic()
    options = _options(arguments)
    try:
        waiting, left_out = _plan(options)
        with output_errors(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"tools.bench all: {error}", file=sys.stderr)
        return 2
    ended: list[Ended] = []
    code = 0
    try:
        for job, limit in _turns(waiting, began + 60.0 * options.minutes - MARGIN, left_out):
            given = command(job, options.out, limit, smoke=options.smoke, commit=options.commit)
            print(f"{job.name}, at most {limit:.0f} s", flush=True)
            (options.out / f"{job.name}.json").unlink(missing_ok=True)  # of an earlier run
            ended.append(run(job.name, given, options.out / f"{job.name}.log", limit))
            print(f"  {ended[-1].how} ({ended[-1].seconds:.0f} s)", flush=True)
            _write(options, ended, left_out)
    except KeyboardInterrupt:
        left_out.append("interrupted: what is not in the table")
        code = INTERRUPTED
    _write(options, ended, left_out)
    return code or int(any(one.code != 0 for one in ended))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    description = " ".join((__doc__ or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser("python -m tools.bench all", description=description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="(%(default)s)")
    add("--minutes", type=float, default=MINUTES, metavar="M", help="(%(default)s)")
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
    chosen = [job for job in found if job.name.startswith(tuple(options.only))]
    if not chosen:
        names = ", ".join(job.name for job in found)
        raise ConfigError(f"--only {' '.join(options.only)}: there are {names}")
    return chosen, left_out


def jobs(*, gpu: bool, smoke: bool, rec: str | None) -> tuple[list[Job], list[str]]:
    """Everything that can run here, the most important first, and why others cannot.

    `pack` is not among them: it measures disks, with peers to install first.
    """
    device = ("--device", "cuda" if gpu else "cpu")
    models = () if gpu else ("--models", "wrn_28_2")
    made = [*_steps(gpu, smoke), _bench("backbone", 70.0, *device, *models)]
    # Without a GPU it counts and compares, and times nothing.
    made.append(_bench("losses", 50.0, *([] if gpu or smoke else ["--smoke"])))
    left_out = []
    if rec or smoke:
        given = ("--rec", rec) if rec else ()
        threads = str(len(os.sched_getaffinity(0)))
        made.append(_bench("input", 60.0, *device, *given, "--threads", threads))
    else:
        left_out.append("input: it reads records, which --rec names")
    others = {"syncs": 30.0, "optimizer": 20.0, "checkpoint": 25.0, "startup": 40.0, "ranks": 20.0}
    return made + [_bench(name, share, *device) for name, share in others.items()], left_out


def command(job: Job, out: Path, seconds: float, *, smoke: bool, commit: str | None) -> list[str]:
    """What is run: the job's own command, where it writes, and how long it may measure."""
    given = [*job.command]
    if not job.result:
        return given
    given += ["--out", str(out / f"{job.name}.json")]
    if not smoke:
        given += ["--minutes", f"{MEASURING * seconds / 60.0:.3f}"]
    if commit:
        given += ["--commit", commit]
    return given + (["--smoke"] if smoke and "--smoke" not in given else [])


def allowance(waiting: Sequence[Job], left: float) -> float:
    """Seconds for the first of those that wait: its share of what is left."""
    return left * waiting[0].share / sum(job.share for job in waiting)


def _turns(
    waiting: Sequence[Job], deadline: float, left_out: list[str]
) -> Iterator[tuple[Job, float]]:
    """Each job and its seconds: what one does not use goes to those behind it."""
    for number, job in enumerate(waiting):
        limit = allowance(waiting[number:], deadline - time.monotonic())
        if limit < SHORTEST:
            left_out.append(f"{job.name}: no time")
        else:
            yield job, limit


def _steps(gpu: bool, smoke: bool) -> list[Job]:
    if smoke or not gpu:
        device = "cuda" if gpu else "cpu"
        return [_bench("step", 90.0 if smoke else 300.0, "--device", device)]
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *TESTS)
    small = _bench("step", 150.0, "--device", "cuda", "--model", "wrn_28_2")
    # In float32 and NCHW so many images of 224 pixels just fit into 80 GB.
    large = _bench("step", 170.0, "--device", "cuda", "--model", "resnet50", "--labeled", "32")
    return [
        Job("gpu_tests", tests, 60.0, result=False),
        small._replace(name="step_wrn_28_2"),
        large._replace(name="step_resnet50"),
    ]


def _bench(name: str, share: float, *options: str) -> Job:
    return Job(name, (sys.executable, "-m", "tools.bench", name, *options), share)


def _gpu(device: str) -> bool:
    """Imports torch only here, so that a wrong option is an error at once."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu, or auto")
    return there and device != "cpu"


def run(name: str, command: Sequence[str], log: Path, limit: float) -> Ended:
    """Runs a command in the repository's root; its output goes to `log`.

    After `limit` seconds it is ended, with all processes that it has started.
    """
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    return Ended(name, code, time.monotonic() - began)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The whole group: compilers and ranks that it has started, as well."""
    if child.poll() is None:
        _signal(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(group, number)


def _write(options: argparse.Namespace, ended: list[Ended], left_out: list[str]) -> None:
    text = page(options.out, ended, left_out, smoke=options.smoke)
    atomic.write_text(options.out / PAGE, text)


def page(out: Path, ended: Sequence[Ended], left_out: Sequence[str], *, smoke: bool) -> str:
    """Markdown, out of what the jobs have written in `out`."""
    parts = ["# Benchmarks", *(["A smoke test: no number here is a claim."] if smoke else [])]
    lines = ["| benchmark | how it ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.how} | {one.seconds:.0f} |" for one in ended]
    parts += ["\n".join(lines), *_left_out(left_out)]
    for one in ended:
        found, log = _json(out, one.name), out / f"{one.name}.log"
        parts.append(f"## {one.name}")
        if found:
            parts += [str(found["claim"]), table(found["rows"]), *_left_out(found["skipped"])]
            parts.append("\n".join(f"- {key}: {value}" for key, value in found["machine"].items()))
        if one.code != 0 or not found:
            printed = log.read_text(errors="replace").splitlines() if log.exists() else []
            parts.append("The end of its log:\n\n```\n" + "\n".join(printed[-TAIL:]) + "\n```")
    return "\n\n".join(parts) + "\n"


def _left_out(lines: Sequence[str]) -> list[str]:
    return ["Left out:\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def _json(out: Path, name: str) -> Json:
    """What a job has written; empty, if it wrote nothing whole."""
    try:
        found = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("form") == FORM else {}
