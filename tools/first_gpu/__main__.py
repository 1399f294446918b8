"""The first minutes on a GPU: tests that need one, benchmarks, a training run, until time is over.

Every step is a process with a time limit, after which it is ended, so that the next ones are run;
after each, OUT has its log and JSON, summary.json and summary.md. The same command goes on where
the last one ended: steps that have passed are not run again.
Exit codes: 0, all steps that were reached have passed; 1, some have not; 2, there is no GPU, or an
option is wrong; 3, OUT cannot be written; 4, FILE or REC is missing; 130, stopped by Ctrl-C or
SIGTERM, the running step too.
"""

import argparse
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from mpl_fast import atomic
from mpl_fast.errors import (
    INTERRUPTED,
    PREEMPTED,
    ConfigError,
    DataError,
    output_errors,
    run_command,
)
from mpl_fast.untrusted import json_object
from tools.bench.jobs import ROOT, Ended, interrupt_on_signals, run
from tools.first_gpu import plan, summary
from tools.first_gpu.plan import ENDLESS, Step
from tools.first_gpu.summary import Outcome, Summary

MARGIN = 5.0  # seconds before the end by which everything is done
GRACE = 10.0  # seconds between SIGTERM and SIGKILL: a checkpoint is saved in them
SHORTEST = 5.0  # seconds in which no step gets anywhere
CHECKED = 120.0  # seconds within which the GPU is found
OF_TRAINING = ("metrics.jsonl", "summary.json", "config.yaml")


def main(arguments: Sequence[str]) -> int:
    """Step after step."""
    began = time.monotonic()
    options = options_of(arguments)
    steps, left_out = plan.steps(options)
    machine = _machine(options)
    with output_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(options.out / "env.json", machine)
        return _run(steps, left_out, options, began + 60.0 * options.minutes - MARGIN)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; paths are made absolute, since steps run in the repository's root."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "tools/first_gpu_run.sh",
        allow_abbrev=False,
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, path = parser.add_argument, Path
    add("--minutes", type=float, default=13.0, metavar="M", help="of the whole call (%(default)s)")
    add(
        "--out",
        type=path,
        default=Path("runs/first_gpu"),
        metavar="OUT",
        help="results (%(default)s)",
    )
    add("--cifar", type=path, metavar="FILE", help="tar of train/ and test/: CIFAR-10, JPEG")
    add("--rec", type=path, metavar="REC", help="records of CIFAR-10, in place of --cifar")
    add("--photographs", type=path, metavar="REC", help="records of large images, for bench input")
    add("--archive", type=path, metavar="FILE", help="OUT without images and checkpoints, a tar.gz")
    add("--only", nargs="+", default=[""], metavar="NAME", help="steps whose names begin so")
    add("--skip", nargs="+", default=[], metavar="NAME", help="all steps but these")
    add(
        "--stretch",
        type=float,
        default=1.0,
        metavar="X",
        help="factor of every step's time limit (%(default)s)",
    )
    add("--commit", metavar="NAME", help="the code's commit, where there is no git")
    add("--smoke", action="store_true", help="tiny benchmarks and training, to try the script")
    options = parser.parse_args(arguments)
    for name in ("minutes", "stretch"):
        if not 0 < getattr(options, name) < math.inf:
            raise ConfigError(f"--{name} {getattr(options, name):g}: take more than 0")
    for name in ("out", "cifar", "rec", "photographs", "archive"):
        if given := getattr(options, name):
            setattr(options, name, given.resolve())
    for name in ("rec", "photographs"):
        given = getattr(options, name)
        if given and not (given / "manifest.json").exists():
            raise DataError(f"--{name} {given} has no manifest.json: pack with tools/make_rec.py")
    if options.cifar and not options.cifar.exists():
        raise DataError(f"--cifar {options.cifar} does not exist")
    return options


def _machine(options: argparse.Namespace) -> str:
    """The environment as JSON; raises `ConfigError` if there is no GPU that can be used."""
    command = [sys.executable, "-m", "tools.first_gpu.environment"]
    command += [options.commit] if options.commit else []
    limit = options.stretch * CHECKED
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"no answer from the GPU in {limit:.0f} s: see nvidia-smi") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = last.removeprefix("first_gpu_run: error: ")
        if reason.startswith("ModuleNotFoundError"):
            reason += f" in {sys.executable}: PYTHON=.venv/bin/python, say, chooses another"
        raise ConfigError(reason)
    found: str = done.stdout
    return found


def _run(
    steps: Sequence[Step], left_out: Sequence[str], options: argparse.Namespace, deadline: float
) -> int:
    out: Path = options.out
    found, names, late = Summary(out, [step.name for step in steps], left_out), [], []
    grace = options.stretch * GRACE
    _print_machine(out)
    try:
        for number, step in enumerate(steps):
            earlier = found.outcomes[step.name]
            if earlier.status == summary.PASSED and not step.again:
                print(f"{step.name}: passed before, on {earlier.where}", flush=True)
                continue
            later = sum(one.kept for one in steps[number + 1 :])
            limit = min(step.limit, deadline - time.monotonic() - grace - later)
            if limit < SHORTEST:
                print(f"{step.name}: not reached", flush=True)
                late.append(step.name)
                continue
            names.append(step.name)
            _one(step, limit, found, options)
    except KeyboardInterrupt:
        found.interrupt()
        print(f"first_gpu_run: interrupted; see {out}/summary.md", file=sys.stderr)
        return INTERRUPTED
    finally:
        found.save()
        _archive(options)
    if late and not names:
        given = f"--minutes {options.minutes:g}"
        raise ConfigError(f"{given}: too short for any of {len(late)} steps; see {out}/summary.md")
    if bad := found.bad(names):
        some = f"{len(bad)} of {len(names)} steps did not pass: {', '.join(bad)}"
        print(f"first_gpu_run: {some}; see {out}/summary.md", file=sys.stderr)
        return 1
    print(f"all {len(names)} steps that were reached have passed; see {out}/summary.md")
    return 0


def _one(step: Step, limit: float, found: Summary, options: argparse.Namespace) -> None:
    """Runs a step and notes what became of it."""
    print(f"{step.name}: at most {limit:.0f} s", flush=True)
    found.set(Outcome(step.name, summary.RUNNING, limit=limit))
    (options.out / f"{step.name}.json").unlink(missing_ok=True)  # of an earlier call
    ended = run(step.name, step.command(limit), options.out, limit, options.stretch * GRACE)
    results = summary.found_by(step.name, options.out)
    status = status_of(step, ended, results)
    seconds = round(ended.seconds, 1)
    found.set(Outcome(step.name, status, ended.code, seconds, round(limit, 1), results))
    _archive(options)
    words = f": {results[0]}" if results else ""
    print(f"  {status} after {seconds:.0f} s{words}", flush=True)


def status_of(step: Step, ended: Ended, results: Sequence[str]) -> str:
    """An endless step is stopped by SIGTERM, for which training has an exit code. Tests that have
    all been skipped prove nothing."""
    if step.name.startswith("test_") and not any(" passed" in line for line in results[:1]):
        well = False
    else:
        well = ended.well or (step.limit == ENDLESS and ended.code in (0, PREEMPTED))
    if well:
        return summary.PASSED
    return summary.FAILED if ended.in_time else summary.TIMED_OUT


def _print_machine(out: Path) -> None:
    machine = json_object(out / "env.json")
    print(f"{machine['gpu']}, driver {machine['driver']}, {machine['versions']}", flush=True)
    if missing := machine["missing"]:
        print(f"missing, so that steps will fail: {', '.join(missing)}", flush=True)


def _archive(options: argparse.Namespace) -> None:
    """Writes the files of OUT, and those of the training that are small, to --archive."""
    if options.archive is None:
        return
    out: Path = options.out
    files = [file for file in sorted(out.iterdir()) if file.is_file()]
    files += [file for name in OF_TRAINING if (file := out / "train" / name).exists()]
    with output_errors(options.archive):
        options.archive.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic.atomic_path(options.archive) as temporary,
            tarfile.open(temporary, "w:gz") as tar,
        ):
            for file in files:
                if file != options.archive and file != temporary:
                    tar.add(file, file.relative_to(out))


if __name__ == "__main__":
    interrupt_on_signals()
    run_command("first_gpu_run", lambda: main(sys.argv[1:]), "interrupted")
