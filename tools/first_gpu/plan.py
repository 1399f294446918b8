"""What is run in the first minutes on a GPU, in its order, and for how long at most."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tools.bench import all as benchmarks
from tools.bench.all import Job
from tools.bench.jobs import ROOT, chosen
from tools.first_gpu.summary import WIDTH

# GPU tests by file, the most important first: seconds after which a file is ended. Those that get
# their marks from a conftest.py have to be here; others may.
TESTS = {
    "tests/data/test_loader.py": 60.0,
    "tests/data/test_eval_loader.py": 40.0,
    "tests/kernels/test_cuda.py": 60.0,
    "tests/training/test_gpu_train.py": 150.0,
    "tests/training/test_gpu_run.py": 120.0,
    "tests/kernels/test_contract.py": 120.0,
    "tests/kernels/test_batch_norm.py": 60.0,
    "tests/data/test_operations.py": 90.0,
    "tests/algorithms/test_definitions.py": 60.0,
}
# Some hundred kernels are compiled, which takes CPU time: as many processes, given xdist.
PARALLEL, PROCESSES = ("tests/kernels/test_contract.py", "tests/kernels/test_batch_norm.py"), 8
OTHER_TESTS = 40.0  # seconds of each further file that has GPU tests
MARK = re.compile(r"[@=] ?pytest\.mark\.gpu\b")  # of a test, a parameter or a whole file
# Of a file's time: a test that has taken so long prints where it is. Near the end, since printing
# the stacks of threads that go on running can end the process by SIGSEGV (seen with Python 3.11).
HANGS = 0.9
PACKING = 90.0
INPUT = 40.0  # of images of 32 pixels
LIMITS = {"syncs": 60.0, "startup": 150.0}  # of benchmarks that take no --minutes into account
CIFAR = ("--image-size", "32", "--batch", "512")  # a step of cifar10_4k_mpl takes 1,024
CONFIGS = ("configs/cifar10_4k_fast_mpl.yaml", "configs/cifar10_4k_mpl.yaml")
# What earlier steps leave for these: seconds, and at most this share of all.
KEPT_FOR_PACKING, KEPT_FOR_TRAINING, KEPT_FOR_EVALUATION = (90.0, 0.15), (120.0, 0.2), (40.0, 0.1)
KEPT_FOR_BENCHMARK = (120.0, 0.15)  # the first one
EVALUATION = 60.0
SOMETIMES = ("pack", "bench_input", "bench_input_cifar", "train", "evaluate")  # given records
ENDLESS = float("inf")
# Of a smoke test: a run that comes to its end.
TINY = ["--model.name", "wrn_10_1", "--labeled-batch", "8", "--unlabeled-batch", "16"]
TINY += ["--steps", "6", "--log-every", "2", "--eval-every", "0", "--compile", "off"]


class Step(NamedTuple):
    """One process; `command` gets the seconds that it has."""

    name: str
    command: Callable[[float], list[str]]
    limit: float
    """Seconds; `ENDLESS`: it is to go on until it is stopped, and does not fail by that."""
    kept: float = 0.0
    """Seconds that the steps before it leave for it."""
    again: bool = False
    """It is run in a later call, too, even if it has passed."""


def steps(options: argparse.Namespace) -> tuple[list[Step], list[str]]:
    """All that these options allow, and why others are left out."""
    left_out: list[str] = []
    made = [*_tests(options.stretch), *_packing(options), *_benchmarks(options, left_out)]
    made += _training(options, left_out)
    names = chosen([step.name for step in made], options.only, options.skip, SOMETIMES)
    found = [step for step in made if step.name in names]
    return [one._replace(limit=options.stretch * one.limit) for one in found], left_out


def _tests(stretch: float) -> Iterator[Step]:
    for file in (*TESTS, *_other_tests()):
        limit = TESTS.get(file, OTHER_TESTS)
        pytest = ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
        pytest += ["-o", f"faulthandler_timeout={HANGS * stretch * limit:.0f}", file]
        if file in PARALLEL and find_spec("xdist"):
            pytest += ["-n", str(min(PROCESSES, len(os.sched_getaffinity(0))))]
        yield Step(Path(file).stem, partial(_in_wide_lines, pytest), limit)


def _in_wide_lines(pytest: list[str], _seconds: float) -> list[str]:
    """In 80 columns pytest's list of failures has no room for their reasons."""
    return ["env", f"COLUMNS={WIDTH}", sys.executable, *pytest]


def _other_tests() -> list[str]:
    """Files of GPU tests that are not in the table."""
    files = [str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("tests/*/test_*.py"))]
    return [f for f in files if f not in TESTS and MARK.search((ROOT / f).read_text("utf-8"))]


def _packing(options: argparse.Namespace) -> Iterator[Step]:
    out, cifar = options.out / "rec", options.cifar
    if cifar and not options.rec and not (out / "manifest.json").exists():
        given = ["--src", f"{cifar}:train", "--val", f"{cifar}:test", "--labeled", "4000"]
        pack = ["tools/make_rec.py", "pack", "--quiet", *given, "--out", str(out)]
        # Without records there is no training, for which time is kept.
        yield Step("pack", _fixed(*pack), PACKING, _kept(KEPT_FOR_PACKING, options), again=True)


def _benchmarks(options: argparse.Namespace, left_out: list[str]) -> Iterator[Step]:
    photographs = str(options.photographs) if options.photographs else None
    found, why = benchmarks.jobs(gpu=True, smoke=options.smoke, rec=photographs)
    left_out += [f"bench_{line.replace('--rec', '--photographs')}" for line in why]
    if rec := _records(options):
        threads = ("--threads", str(len(os.sched_getaffinity(0))))
        of_rec = ("--device", "cuda", *CIFAR, *threads, "--rec", str(rec))
        place = next(n for n, job in enumerate(found) if job.name == "syncs")
        found.insert(place, Job("input_cifar", ("tools.bench", "input", *of_rec), INPUT))
    for job in found:
        named = job._replace(name=f"bench_{job.name}")
        limit = LIMITS.get(job.name, job.share)
        kept = _kept(KEPT_FOR_BENCHMARK, options) if job == found[0] else 0.0
        yield Step(named.name, partial(benchmarks.command, named, options=options), limit, kept)


def _training(options: argparse.Namespace, left_out: list[str]) -> Iterator[Step]:
    rec, run = _records(options), str(options.out / "train")
    if rec is None:
        left_out.append("train: it needs CIFAR-10, which --cifar or --rec names")
        return
    config = next(name for name in CONFIGS if (ROOT / name).exists())
    train = ["mpl_fast/train.py", "--config", config, "--data.root", str(rec), "--run-dir", run]
    train += ["--device", "cuda", *(TINY if options.smoke else [])]
    kept = [_kept(bounds, options) for bounds in (KEPT_FOR_TRAINING, KEPT_FOR_EVALUATION)]
    yield Step("train", _fixed(*train), ENDLESS, kept[0], again=True)
    yield Step("evaluate", _fixed("tools/evaluate.py", run), EVALUATION, kept[1], again=True)


def _kept(bounds: tuple[float, float], options: argparse.Namespace) -> float:
    """Seconds, of `KEPT_FOR_...`."""
    most, share = bounds
    minutes: float = options.minutes
    return min(most, share * 60.0 * minutes)


def _records(options: argparse.Namespace) -> Path | None:
    """CIFAR-10's, packed before or by a step of this run."""
    packed: Path | None = options.rec or (options.out / "rec" if options.cifar else None)
    return packed


def _fixed(*arguments: str) -> Callable[[float], list[str]]:
    """A Python command that does not depend on its time."""
    return lambda seconds: [sys.executable, *arguments]
