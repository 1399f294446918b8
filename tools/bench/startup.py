"""Measures what a user waits for: --help, and the first step, compiled cold and warm.

Each number is of a process of its own, from its start. A first step ends when its checkpoint is
begun. Cold: nothing has been compiled before. Warm: another run directory, with the compile
caches that the cold run left. Resume: the warm run goes on from its checkpoint, for one step more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpl_fast.learner.compilation import CACHES
from mpl_fast.untrusted import json_value
from tools.bench.harness import Report, run
from tools.bench.machine import DEVICES, ROOT, choose_device
from tools.bench.results import Row, last_line, spread
from tools.bench.smooth_images import packed

USUAL = {"recipe": "mpl", "labeled": 16, "unlabeled": 32, "image_size": 32}
TINY = {"model": "wrn_10_1", "recipe": "supervised", "labeled": 4, "unlabeled": 4, "rounds": 1}
TRAIN = ROOT / "mpl_fast" / "train.py"
HELP = 0.5  # seconds, the target
# Of a smoke test, to compile in half the time: no worker processes and no vector instructions,
# for which libraries are compiled that only show which of them the CPU has.
SCALAR = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}


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
            turns = report.interleaved({"all": starts.seconds}, lambda seconds: seconds(), warmup=0)
        found = turns["all"]
        report.add(rows({name: [one[name] for one in found] for name in found[0]}))
    except FailedError as error:
        report.fail("a process", str(error))


def run_train(*options: str, **environment: str) -> None:
    """Raises `FailedError`."""
    done = subprocess.run(
        [sys.executable, TRAIN, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise FailedError(f"exit code {done.returncode}: {last_line(done.stdout)}")


class Starts:
    """Training runs that start in different ways, and the folders that they leave."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._folder, self._rounds = folder, 0
        self._environment = SCALAR if options.smoke else {}
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
        began = time.perf_counter()
        run_train("--help")
        return {
            "--help": time.perf_counter() - began,
            # Kernels of the losses are compiled here too, on a GPU.
            "first step, not compiled": self._until(1, folder / "plain", "off", other),
            "first step, compiled cold": self._until(1, folder / "cold", "default", kept),
            "first step, compiled warm": self._until(1, warm, "default", kept),
            "resume to the next step, warm": self._until(2, warm, "default", kept),
        }

    def _until(self, step: int, run: Path, mode: str, caches: Path) -> float:
        """Trains until a step, at whose end a checkpoint is begun."""
        given = self._training | {"run-dir": run, "stop-at": step, "compile": mode}
        # Places that are given stay, whatever a run would choose.
        places = {variable: str(caches / name) for variable, name in CACHES.items()}
        places |= self._environment
        began = time.time()
        run_train(*(f"--{name}={value}" for name, value in given.items()), **places)
        lines = [json_value(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        saved = [line for line in lines if line.get("event") == "checkpoint"][-1]
        seconds: float = saved["time"] - saved["seconds"] - began
        return seconds


def rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Of `Starts.seconds`; what is not compiled is the limit of what is."""
    found = {name: spread(values) for name, values in seconds.items()}
    shortest, plain, *compiled = found.items()
    return [
        Row(*shortest, "s", target=HELP),
        Row(*plain, "s"),
        *(Row(*one, "s", limit=plain[1].median) for one in compiled),
    ]
