"""Timed processes: commands to their end, and training until a step's metrics are written."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mpl_fast.learner.compilation import CACHES
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.pack import pack

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "mpl_fast" / "train.py"
POLL = 0.005  # seconds between two looks at the metrics
LATE = 1800.0  # seconds after which a step is given up


class FailedError(Exception):
    """A process ended badly; the text is its last line."""


class Starts:
    """The commands, and the folders that the runs leave."""

    def __init__(self, options: argparse.Namespace, folder: Path, records: Path) -> None:
        self._folder, self._compile = folder, options.compile
        self._training = {
            "recipe": options.recipe,
            "model.name": options.model,
            "labeled-batch": options.labeled,
            "unlabeled-batch": options.unlabeled,
            "data.image-size": options.image_size,
            "data.weak": "cifar",
            "data.root": records,
            "device": options.device,
            "steps": 1000,
            "log-every": 1,
            "eval-every": 0,
            "checkpoint-every": 0,
        }

    def help(self) -> None:
        """As a user asks for it."""
        _to_the_end([str(TRAIN), "--help"])

    def parse(self) -> None:
        """A command line, as training does before it imports PyTorch."""
        code = "import mpl_fast.config.command_line as c; c.parse(['--run-dir=r', '--data.root=d'])"
        _to_the_end(["-c", code])

    def import_torch(self) -> None:
        """What no training can do without."""
        _to_the_end(["-c", "import torch"])

    def import_trainer(self) -> None:
        """All that a run imports before it begins."""
        _to_the_end(["-c", "import mpl_fast.training.run"])

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
        """Trains until a step and pauses; its row is written before anything else is done."""
        # A place that is given stays, whatever a run would choose.
        environment = {variable: str(caches / name) for variable, name in CACHES.items()}
        given = self._training | {"run-dir": run, "stop-at": step, "compile": mode}
        command = [sys.executable, str(TRAIN), *(f"--{k}={v}" for k, v in given.items())]
        with (self._folder / "output").open("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=_environment() | environment
            )
            try:
                took = _seconds_to_row(run / "metrics.jsonl", step, process, began)
                code = process.wait(LATE)
            except subprocess.TimeoutExpired:
                took, code = None, None
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            if code or took is None:
                raise FailedError(f"training failed (exit code {code}): {_last(output.read())}")
        return took


def _seconds_to_row(
    metrics: Path, step: int, process: "subprocess.Popen[bytes]", began: float
) -> float | None:
    """Until a step's row stands in the file; nothing if the process ends without it."""
    while time.perf_counter() - began < LATE:
        ended = process.poll() is not None
        now = time.perf_counter()
        if metrics.exists() and _has(metrics.read_text(), step):
            return now - began
        if ended:
            return None
        time.sleep(POLL)
    return None


def _has(rows: str, step: int) -> bool:
    """Whether a whole line is of this step."""
    whole = rows.split("\n")[:-1]
    return any(json.loads(line)["step"] == step for line in whole)


def _to_the_end(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    )
    if done.returncode:
        raise FailedError(f"{' '.join(arguments)}: {_last(done.stderr)}")


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def generated(folder: Path, labeled: int, unlabeled: int) -> Path:
    """Records of two classes of smooth images, as many as a step takes."""
    chance, count = np.random.default_rng(0), max(labeled + unlabeled, 8)
    for number in range(count + 8):
        kind = "train" if number < count else "val"
        file = folder / kind / f"class_{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        seed = Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8))
        seed.resize((48, 40), Image.Resampling.BICUBIC).save(file)
    train, val, out = str(folder / "train"), str(folder / "val"), folder / "rec"
    split = SplitOptions(labeled=str(2 * ((labeled + 1) // 2)))
    pack(PackOptions(src=(train,), val=val, out=out, split=split, quiet=True))
    return out
