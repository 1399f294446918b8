"""Runs every benchmark that this machine can run, the most important first, and stops in time.

Each is a process of its own with a share of the time, ended when that is over; what it does not use
goes to those behind it. OUT gets NAME.json and NAME.log of each, and summary.md: all tables, how
each ended, and what was left out. That page is written anew after each. `--smoke` is passed on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Sequence

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, DataError, UserError, output_errors
from tools.bench_steps.plan import ROOT, SHORTEST, Job, allowance, command, jobs
from tools.bench_steps.running import Ended, run
from tools.bench_steps.summary import NAME, page

MINUTES, SMOKE_MINUTES = 9.0, 6.0
MARGIN = 5.0  # seconds before the end by which everything is done
INTERRUPTED = 130  # as shells have it after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a benchmark failed or was ended. 2: an option that cannot be."""
    began = time.monotonic()
    options = _options(arguments)
    try:
        waiting, left_out = _plan(options)
        with output_errors(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        fail("bench_all", error)
    ended: list[Ended] = []
    try:
        _all(options, waiting, began, ended, left_out)
    except KeyboardInterrupt:
        left_out.append("interrupted: what is not in the table")
        _write(options, ended, left_out)
        return INTERRUPTED
    for line in left_out:
        print(f"left out: {line}")
    print(options.out / NAME)
    return int(any(not one.well for one in ended))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="(%(default)s)")
    add("--minutes", type=float, metavar="M", help=f"({MINUTES:g}, a smoke test {SMOKE_MINUTES:g})")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--rec", metavar="DIR", help="records that make_rec.py packed, for bench_data")
    add("--only", nargs="+", default=[], metavar="NAME", help="benchmarks that begin with this")
    add("--commit", metavar="NAME", help="where there is no git to ask")
    add("--smoke", action="store_true", help="everything once, tiny: no number is a claim")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> tuple[list[Job], list[str]]:
    if options.minutes is None:
        options.minutes = SMOKE_MINUTES if options.smoke else MINUTES
    if options.minutes <= 0:
        raise ConfigError(f"--minutes {options.minutes:g}: take more than 0")
    if options.rec and not (Path(options.rec) / "manifest.json").exists():
        raise DataError(f"--rec {options.rec} has no manifest.json: pack it with tools/make_rec.py")
    rec = str(Path(options.rec).resolve()) if options.rec else None
    options.out = options.out.resolve()  # the benchmarks run elsewhere
    found, left_out = jobs(gpu=_gpu(options.device), smoke=options.smoke, rec=rec)
    names = [job.name for job in found]
    for wanted in options.only:
        if not any(name.startswith(wanted) for name in names):
            raise ConfigError(f"--only {wanted}: there are {', '.join(names)}")
    if options.only:
        found = [job for job in found if job.name.startswith(tuple(options.only))]
        left_out = [line for line in left_out if line.startswith(tuple(options.only))]
    return found, left_out


def _gpu(device: str) -> bool:
    """Imports torch only here, so that a wrong option is told at once."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu, or auto")
    return there and device != "cpu"


def _all(
    options: argparse.Namespace,
    waiting: list[Job],
    began: float,
    ended: list[Ended],
    left_out: list[str],
) -> None:
    """Job after job; `ended` and `left_out` tell as far as it came, whatever happens."""
    deadline = began + 60.0 * options.minutes - MARGIN
    while waiting:
        job, limit = waiting[0], allowance(waiting, deadline - time.monotonic())
        waiting = waiting[1:]
        if limit < SHORTEST:
            left_out.append(f"{job.name}: no time")
        else:
            ended.append(_one(options, job, limit))
        _write(options, ended, left_out)


def _one(options: argparse.Namespace, job: Job, limit: float) -> Ended:
    given = command(job, options.out, limit, smoke=options.smoke, commit=options.commit)
    print(f"{job.name}, at most {limit:.0f} s", flush=True)
    for kind in ("json", "md"):
        (options.out / f"{job.name}.{kind}").unlink(missing_ok=True)  # of an earlier run
    ended = run(job.name, given, options.out / f"{job.name}.log", limit, folder=ROOT)
    print(f"  {ended.how} ({ended.seconds:.0f} s)", flush=True)
    return ended


def _write(options: argparse.Namespace, ended: list[Ended], left_out: list[str]) -> None:
    text = page(options.out, ended, left_out, smoke=options.smoke)
    aside = options.out / f".{NAME}.writing"
    aside.write_text(text, encoding="utf-8")
    aside.replace(options.out / NAME)


if __name__ == "__main__":
    raise SystemExit(main())
