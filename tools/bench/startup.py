"""Measures what a user waits for: --help, and the first step, compiled cold and warm.

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
from pathlib import Path

from mpl_fast.learner.compilation import CACHES
from tools.bench.clock import interleaved
from tools.bench.harness import Report, run
from tools.bench.machine import DEVICES, ROOT, choose_device
from tools.bench.results import Row, last_line, spread
from tools.bench.smooth_images import packed

USUAL = {"recipe": "mpl", "labeled": 16, "unlabeled": 32, "image_size": 32}
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
    parser.set_defaults(**USUAL)
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """One round after the other; the starts of training need each other's caches."""
    options.device = choose_device(options.device).type
    report.claim = f"median of up to {options.rounds} rounds, each number of a process of its own"
    try:
        with tempfile.TemporaryDirectory() as folder:
            starts = Starts(options, Path(folder))
            found = interleaved(
                {"all": starts.seconds},
                lambda seconds: seconds(),
                rounds=options.rounds,
                warmup=0,
                seconds=report.seconds_left(),
            )["all"]
        report.add(rows({name: [one[name] for one in found] for name in found[0]}))
    except FailedError as error:
        report.fail("a process", str(error))


def seconds_of_help() -> float:
    """Raises `FailedError`."""
    began, command = time.perf_counter(), [sys.executable, str(TRAIN), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise FailedError(f"--help: {last_line(done.stderr)}")
    return time.perf_counter() - began


class Starts:
    """Training runs that start in different ways, and the folders that they leave."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._folder, self._rounds = folder, 0
        self._training = {
            "recipe": options.recipe,
            "model.name": options.model,
            "labeled-batch": options.labeled,
            "unlabeled-batch": options.unlabeled,
            "data.image-size": options.image_size,
            "data.crop": "pad_crop",
            "data.root": packed(folder, options.labeled + options.unlabeled, options.labeled),
            "device": options.device,
            "steps": 1000,
            "log-every": 1,
            "eval-every": 0,
            "checkpoint-every": 0,
        }

    def seconds(self) -> dict[str, float]:
        """Of --help, and from the start of a process to the end of its first step."""
        self._rounds += 1
        folder = self._folder / str(self._rounds)
        other, kept, warm = folder / "other_caches", folder / "caches", folder / "warm"
        return {
            "--help": seconds_of_help(),
            # Kernels of the losses are compiled here too, on a GPU.
            "first step, not compiled": self._until(1, folder / "plain", "off", other),
            "first step, compiled cold": self._until(1, folder / "cold", "default", kept),
            "first step, compiled warm": self._until(1, warm, "default", kept),
            "resume to the next step, warm": self._until(2, warm, "default", kept),
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


def rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Of `Starts.seconds`; what is not compiled is the limit of what is."""
    found = {name: spread(values) for name, values in seconds.items()}
    shortest, plain, *compiled = found.items()
    return [
        Row(*shortest, "s", target=HELP),
        Row(*plain, "s"),
        *(Row(*one, "s", limit=plain[1].median) for one in compiled),
    ]
