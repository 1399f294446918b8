"""Times a step on every rank, with the others and without: run by torchrun, rank 0 writes.

usage: ranks.py OUT.json MODEL LABELED MU SIZE DEVICE STEPS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mpl_fast import distributed
from mpl_fast.training.process import die_with_launcher
from tools.bench.clock import wait_for_gpu
from tools.bench_steps import contestants
from tools.bench_steps.contestants import Flavor
from tools.bench_steps.setting import Setting

WARM = 3
TOGETHER, ALONE = "together", "alone"


def timed(
    setting: Setting, ranks: int, steps: int, seconds: float | None
) -> dict[str, list[float]]:
    """Seconds of steps on so many ranks: `together`, and `alone`, with nothing exchanged.

    All ranks work at the same time in either case, so that their difference is the exchange and
    the waiting for the slowest, and not what they take from each other of memory or cores. A rank
    on a CPU has one thread. A step takes as long as its slowest rank. Raises RuntimeError with what
    the ranks said if they fail, or if they take longer than `seconds`.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "timed.json"
        sizes = [setting.model, *map(str, (setting.labeled, setting.mu, setting.size))]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, "-m", *launcher, __file__, str(out), *sizes]
        try:
            done = subprocess.run(
                [*command, setting.device.type, str(steps)],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{ranks} ranks took longer than {seconds:.0f} s") from error
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks failed:\n{done.stderr[-4000:]}")
        found: dict[str, list[float]] = json.loads(out.read_text())
    return found


def main(out: str, model: str, labeled: str, mu: str, size: str, device: str, steps: str) -> None:
    """One rank."""
    die_with_launcher()
    place = distributed.start(device)
    torch.backends.cudnn.benchmark = True
    setting = Setting(model, int(labeled), int(mu), int(size), place.device)
    works = {TOGETHER: _step(setting), ALONE: _alone(_step, setting)}
    order, found = random.Random(0), {name: list[float]() for name in works}
    for number in range(-WARM, int(steps)):
        for name in order.sample([*works], len(works)):  # alike on all ranks
            took = _seconds(works[name])
            if number >= 0:
                found[name].append(took)
    slowest = {name: _slowest(times) for name, times in found.items()}
    if place.is_first:
        Path(out).write_text(json.dumps(slowest))
    distributed.stop()


def _step(setting: Setting) -> Callable[[], Any]:
    one = contestants.ours(setting, "mpl", Flavor(bf16=setting.device.type == "cuda"))
    assert one is not None
    return one.step


def _alone(make: Callable[[Setting], Callable[[], Any]], setting: Setting) -> Callable[[], Any]:
    """The step of a process that knows of no others."""
    with _no_others():
        step = make(setting)

    def alone() -> Any:
        with _no_others():
            return step()

    return alone


@contextmanager
def _no_others() -> Iterator[None]:
    with mock.patch.object(dist, "is_initialized", return_value=False):
        yield


def _seconds(work: Callable[[], Any]) -> float:
    """Begun by all ranks at once."""
    wait_for_gpu()
    distributed.barrier()
    began = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - began


def _slowest(times: list[float]) -> list[float]:
    return [max(turn) for turn in zip(*distributed.gather(times), strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
