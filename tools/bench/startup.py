"""Measures what a user waits for: --help, imports, and the first step, compiled cold and warm.

Each number is of a process of its own, from its start. A first step ends when its row of metrics is
written. Cold: nothing has been compiled before. Warm: another run directory, with the compile
caches that the cold run left. Resume: the warm run goes on from its checkpoint, for one step more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from mpl_fast.learner.compilation import CACHES
from tools.bench.clock import Work, interleaved, seconds_of
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, ROOT, choose_device
from tools.bench.results import Row, last_line, spread
from tools.bench.smooth_images import packed

TINY = {"model": "wrn_10_1", "recipe": "supervised", "labeled": 4, "unlabeled": 4, "rounds": 1}
TRAIN = ROOT / "mpl_fast" / "train.py"
HELP = 0.5  # seconds, the target
POLL = 0.005  # seconds between two readings of the metrics
LATE = 1800.0  # seconds after which a step is given up


class FailedError(Exception):
    """A process ended with an error; the text is its last line."""


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("startup", __doc__, arguments, measure, options, rounds=3, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    add("--model", default="wrn_28_2", metavar="NAME", help="(%(default)s)")
    add("--recipe", default="mpl", metavar="NAME", help="(%(default)s)")
    add("--labeled", type=at_least(1), default=16, metavar="N", help="images a step (%(default)s)")
    add("--unlabeled", type=at_least(1), default=32, metavar="N", help="images (%(default)s)")
    add("--image-size", type=int, default=32, metavar="N", help="(%(default)s)")
    add("--compile", choices=("default", "max-autotune"), default="default", help="(%(default)s)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Short processes first; then training, whose starts need each other's caches."""
    options.device = choose_device(options.device).type
    report.claim = f"median of up to {options.rounds} rounds, each number of a process of its own"
    try:
        found = interleaved(
            short_processes(),
            seconds_of,
            rounds=options.rounds,
            warmup=0 if options.smoke else 1,
            seed=options.seed,
            seconds=report.seconds_left(2),
        )
        report.add(short_rows(found))
        with tempfile.TemporaryDirectory() as folder:
            starts = Starts(options, Path(folder))
            numbers = count()
            rounds = interleaved(
                {"first steps": starts},
                lambda starts: starts.first_steps(next(numbers)),
                rounds=options.rounds,
                warmup=0,
                seconds=report.seconds_left(),
            )["first steps"]
        report.add(first_step_rows({name: [one[name] for one in rounds] for name in rounds[0]}))
    except FailedError as error:
        report.fail("a process", str(error))


def short_processes() -> dict[str, Work]:
    """By the names of their rows."""
    parsing = "from mpl_fast.config.command_line import parse"
    commands = {
        "--help": [str(TRAIN), "--help"],
        "parse a command line": ["-c", f"{parsing}; parse(['--run-dir=r', '--data.root=d'])"],
        "import torch": ["-c", "import torch"],
        "import the trainer": ["-c", "import mpl_fast.training.run"],
    }

    def process(arguments: Sequence[str]) -> Work:
        return lambda: run_to_its_end(arguments)

    return {name: process(arguments) for name, arguments in commands.items()}


def run_to_its_end(arguments: Sequence[str]) -> None:
    """Runs Python. Raises `FailedError`."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise FailedError(f"{' '.join(arguments)}: {last_line(done.stderr)}")


class Starts:
    """Training runs that start in different ways, and the folders that they leave."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._folder, self._compile = folder, options.compile
        images = max(options.labeled + options.unlabeled, 8)
        self._training = {
            "recipe": options.recipe,
            "model.name": options.model,
            "labeled-batch": options.labeled,
            "unlabeled-batch": options.unlabeled,
            "data.image-size": options.image_size,
            "data.crop": "pad_crop",
            "data.root": packed(folder, images, labeled=2 * ((options.labeled + 1) // 2)),
            "device": options.device,
            "steps": 1000,
            "log-every": 1,
            "eval-every": 0,
            "checkpoint-every": 0,
        }

    def first_steps(self, number: int) -> dict[str, float]:
        """Seconds from the start of a process to the end of its first step, by kind of start."""
        plain, cold, warm = (self._folder / f"{x}_{number}" for x in ("plain", "cold", "warm"))
        kept = self._folder / f"caches_{number}"
        return {
            # Kernels of the losses are compiled here too, on a GPU.
            "not compiled": self._until(1, plain, "off", self._folder / f"other_caches_{number}"),
            "cold": self._until(1, cold, self._compile, kept),
            "warm": self._until(1, warm, self._compile, kept),
            "resume": self._until(2, warm, self._compile, kept),
        }

    def _until(self, step: int, run: Path, mode: str, caches: Path) -> float:
        """Trains until a step, whose row is written before anything else is done."""
        # A place that is given stays, whatever a run would choose.
        places = {variable: str(caches / name) for variable, name in CACHES.items()}
        given = self._training | {"run-dir": run, "stop-at": step, "compile": mode}
        command = [sys.executable, str(TRAIN), *(f"--{k}={v}" for k, v in given.items())]
        with (self._folder / "output").open("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, env={**os.environ, **places}
            )
            try:
                took = seconds_to_row(run / "metrics.jsonl", step, process, began)
                code = process.wait(LATE)
            except subprocess.TimeoutExpired:
                took, code = None, None
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            if code or took is None:
                raise FailedError(f"training (exit code {code}): {last_line(output.read())}")
        return took


def seconds_to_row(
    metrics: Path, step: int, process: "subprocess.Popen[bytes]", began: float
) -> float | None:
    """Until a step's row is in the file; None if the process ends without it."""
    while time.perf_counter() - began < LATE:
        ended = process.poll() is not None
        now = time.perf_counter()
        if metrics.exists() and has_row(metrics.read_text(), step):
            return now - began
        if ended:
            return None
        time.sleep(POLL)
    return None


def has_row(rows: str, step: int) -> bool:
    """Whether a complete line is of this step."""
    complete = rows.split("\n")[:-1]
    return any(json.loads(line)["step"] == step for line in complete)


def short_rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Of `short_processes`."""
    found = {name: spread(values) for name, values in seconds.items()}
    targets = {"--help": HELP, "parse a command line": HELP}
    limits = {"import the trainer": found["import torch"].median}
    return [
        Row(name, value, "s", limit=limits.get(name), target=targets.get(name))
        for name, value in found.items()
    ]


def first_step_rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Of `Starts.first_steps`; what is not compiled is the limit of what is."""
    found = {name: spread(values) for name, values in seconds.items()}
    plain = found["not compiled"].median
    return [
        Row("first step, not compiled", found["not compiled"], "s"),
        Row("first step, compiled cold", found["cold"], "s", limit=plain),
        Row("first step, compiled warm", found["warm"], "s", limit=plain),
        Row("resume to the next step, warm", found["resume"], "s", limit=plain),
    ]
