"""Measures checkpoints: how long a save stops training, verifying and resuming take.

The network is trained by Meta Pseudo Labels, so a checkpoint holds two learners. A save in the
foreground stops training until the checkpoint is complete, one in the background for a copy of the
state. The limits are of the same bytes in the same run: copied in memory, written to a file in the
same folder and synced, and hashed in memory. With `--ranks 2`, saves of so many ranks are compared
with those of `torch.distributed.checkpoint.async_save`.
"""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpl_fast import algorithms, models
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.config import MPLConfig
from mpl_fast.errors import output_errors
from mpl_fast.learner import Learner
from mpl_fast.learner.rng import generator_states
from mpl_fast.training.checkpoint import Checkpoints, newest
from mpl_fast.training.state import restore
from tools.bench.clock import seconds_of
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, choose_device
from tools.bench.results import Row, spread
from tools.bench.step_variants import Setting
from tools.bench.torchrun import on_ranks

TINY = {"model": "wrn_10_1", "rounds": 1}
CLASSES = 1000
STALL = 50.0  # ms, the target of a save in the background


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("checkpoint", __doc__, arguments, measure, options, rounds=5, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    add("--model", default="resnet50", metavar="NAME", help="(%(default)s)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")
    add("--folder", type=Path, default=Path("runs"), help="on the disk to measure (%(default)s)")
    add("--ranks", type=at_least(2), metavar="N", help="also saves of N ranks, beside async_save")


def measure(options: argparse.Namespace, report: Report) -> None:
    """In a new folder in `--folder`, which is removed."""
    device = choose_device(options.device)
    options.device = device.type
    torch.manual_seed(options.seed)
    algorithm = new_algorithm(options.model, device)
    report.claim = (
        f"median of at most {options.rounds} interleaved rounds; files are read from the page cache"
    )
    with output_errors(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=".bench_checkpoint_", dir=options.folder)
    with place as folder:
        disk = Disk(algorithm, Path(folder))
        works: list[Callable[[], None]] = [disk.save, disk.background, disk.whole_background]
        works += [disk.verify, disk.resume, disk.plain_copy, disk.plain_write, disk.plain_hash]
        named = {work.__name__: work for work in works}
        seconds = report.interleaved(named, disk.seconds_of, warmup=1)
        report.add(rows(seconds, disk.content.nbytes))
        if options.ranks:
            del disk
            setting = Setting(options.model, 0, 0, 0, device)
            given = [folder, str(options.rounds)]
            with report.attempt("ranks"):
                found = on_ranks("tools.bench.async_save", options.ranks, setting, given)
                report.add(rows_of_ranks(found, options.ranks))


def new_algorithm(model: str, device: torch.device) -> Algorithm:
    """Raises `ConfigError` for an unknown name."""
    return algorithms.build(
        MPLConfig(),
        lambda config: Learner(models.build(model, CLASSES), config, steps=1, device=device),
    )


class Disk:
    """Checkpoints as training writes and reads them, and the same bytes handled plainly.

    One checkpoint exists from the beginning; each `save` adds one, and the oldest is removed.
    """

    def __init__(self, algorithm: Algorithm, folder: Path) -> None:
        self._algorithm, self._plain = algorithm, folder / "plain"
        self._checkpoints = Checkpoints(folder / "checkpoints", keep=2, rank=0, world=1)
        self._step = 0
        self.save()
        files = sorted(file for file in self._latest.iterdir() if file.suffix == ".pt")
        self.content = torch.frombuffer(
            bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8
        )
        self._copied = torch.empty_like(self.content)
        self.plain_write()

    def seconds_of(self, work: Callable[[], None]) -> float:
        """Of one call; what it has left in the background then ends, and is not counted."""
        seconds = seconds_of(work)
        self._checkpoints.finish(last=True)
        return seconds

    def save(self, *, background: bool = False) -> None:
        """In the foreground, what training waited for until the checkpoint was complete."""
        algorithm, self._step = self._algorithm, self._step + 1
        shared: dict[str, Any] = {
            "step": self._step,
            "learners": {name: x.state_dict() for name, x in algorithm.learners.items()},
            "algorithm": dict(algorithm.state),
        }
        self._latest = self._checkpoints.save(
            self._step, shared, generator_states(), background=background
        )

    def background(self) -> None:
        """What training waits for."""
        self.save(background=True)

    def whole_background(self) -> None:
        """Until a checkpoint that is written in the background is complete."""
        self.background()
        self._checkpoints.finish(last=True)

    def verify(self) -> None:
        """Finds the newest undamaged checkpoint, by its checksums."""
        found, damage = newest(self._checkpoints.folder)
        if found != self._latest or damage:
            raise AssertionError(f"{found} is not {self._latest}: {damage}")

    def resume(self) -> None:
        """From a new process's networks to those of the checkpoint."""
        self.verify()
        restore(self._algorithm, self._checkpoints.load(self._latest)[0], self._latest)

    def plain_copy(self) -> None:
        """The same bytes to memory that was used before, by all threads."""
        self._copied.copy_(self.content)

    def plain_write(self) -> None:
        """The same bytes to one file, synced."""
        with self._plain.open("wb") as file:
            file.write(self.content.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def plain_hash(self) -> None:
        """SHA-256 of the same bytes."""
        hashlib.sha256(self.content.numpy().data).digest()


def rows(seconds: Mapping[str, Sequence[float]], size: int) -> list[Row]:
    """Milliseconds and rates of a checkpoint of `size` bytes, limited by the plain work's."""
    ms = {name: spread([1e3 * s for s in found]) for name, found in seconds.items()}
    rate = {name: spread([1e-6 * size / s for s in found]) for name, found in seconds.items()}
    limits = {"save": "plain_write", "verify": "plain_hash"}
    least, stop = ms["plain_copy"].median, ms["background"]
    made = [
        Row("a checkpoint", spread([size / 1e6]), "MB", steady=True),
        Row("a save stops training", stop, "ms", limit=least, target=STALL),
        Row("a save in the foreground", ms["save"], "ms", limit=ms["plain_write"].median),
        Row("a save in the background, whole", ms["whole_background"], "ms"),
        Row("verify, load and restore", ms["resume"], "ms"),
    ]
    for name in (*limits, *limits.values(), "plain_copy"):
        limit = rate[limits[name]].median if name in limits else None
        made.append(Row(name.replace("_", " "), rate[name], "MB/s", "higher", limit=limit))
    return made


def rows_of_ranks(found: Mapping[str, Sequence[Sequence[float]]], ranks: int) -> list[Row]:
    """For each way to save, how long it stops training, and how long it takes to the end."""
    made = []
    for name, seconds in found.items():
        stopped, whole = (spread([1e3 * s for s in part]) for part in zip(*seconds, strict=True))
        made.append(Row(f"{ranks} ranks, {name}: stops training", stopped, "ms"))
        made.append(Row(f"{ranks} ranks, {name}: whole", whole, "ms"))
    return made
