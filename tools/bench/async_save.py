"""On one rank of several: how long saves stop training, ours and `distributed.checkpoint`'s.

`tools.bench.checkpoint` starts it under torchrun. All ranks have equal states, as in training.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from mpl_fast import distributed
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.learner.rng import generator_states
from mpl_fast.training.checkpoint import Checkpoints
from mpl_fast.training.process import die_with_launcher
from tools.bench.checkpoint import new_algorithm
from tools.bench.clock import interleaved, wait_for_gpu
from tools.bench.torchrun import arguments_of

Wait = Callable[[], object]


def rank(given: Sequence[str]) -> None:
    """Rank 0 writes, for each way to save, the seconds of the slowest rank: those in which training
    stops, and those to the end."""
    die_with_launcher()
    dist_env = distributed.init(given[5])
    out, setting, (folder, rounds) = arguments_of(given, dist_env.device)
    torch.manual_seed(0)
    ways = Ways(new_algorithm(setting.model, dist_env.device), Path(folder))
    named = {"ours": ways.ours, "async_save": ways.as_called, "async_save, memory kept": ways.kept}
    named["async_save, a process"] = ways.process
    found = interleaved(named, ways.seconds_of, rounds=int(rounds), warmup=1)
    if dist_env.is_rank0:
        out.write_text(json.dumps(found))
    distributed.shutdown()


class Ways:
    """Each begins to save and returns what waits for the end."""

    def __init__(self, algorithm: Algorithm, folder: Path) -> None:
        self._algorithm, self._folder, self._step = algorithm, folder, 0
        self._checkpoints = Checkpoints(
            folder / "ours", keep=2, rank=distributed.rank(), world=distributed.world_size()
        )
        cuda = torch.cuda.is_available()  # else memory cannot be pinned
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._shared = DefaultStager(StagingOptions(cuda, True, False, cuda))

    def seconds_of(self, begin: Callable[[], Wait]) -> tuple[float, float]:
        """Of the slowest rank, until training goes on and until the end."""
        self._step += 1
        wait_for_gpu()
        distributed.barrier()
        began = time.perf_counter()
        wait = begin()
        wait_for_gpu()
        stopped = time.perf_counter() - began
        wait()
        whole = time.perf_counter() - began
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(self._place, ignore_errors=True)
        stops, wholes = zip(*distributed.all_gather_object((stopped, whole)), strict=True)
        return max(stops), max(wholes)

    def ours(self) -> Wait:
        """As training saves in the background."""
        self._checkpoints.save(self._step, self._state(), generator_states(), background=True)
        return lambda: self._checkpoints.finish(last=True)

    def as_called(self) -> Wait:
        """With what `async_save` chooses: a thread, and new memory for each copy."""
        return self._begin()

    def kept(self) -> Wait:
        """With a copy in the memory of the one before, pinned on a GPU."""
        return self._begin(async_stager=self._stager)

    def process(self) -> Wait:
        """As `kept`, in memory that a process which writes shares."""
        kind = AsyncCheckpointerType.PROCESS
        return self._begin(async_stager=self._shared, async_checkpointer_type=kind)

    def _begin(self, **options: Any) -> Wait:
        saving: Any = async_save(self._state(), checkpoint_id=self._place, **options)
        return lambda: saving.result()

    @property
    def _place(self) -> Path:
        return self._folder / f"async_save_{self._step}"

    def _state(self) -> dict[str, Any]:
        learners = self._algorithm.learners
        return {
            "step": self._step,
            "learners": {name: learner.state_dict() for name, learner in learners.items()},
            "algorithm": dict(self._algorithm.state),
        }


if __name__ == "__main__":
    rank(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the processes and threads of `async_save` are not ended
