"""Trains on made-up batches and saves how each training ended, for test_two_ranks.py."""

import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from mpl_fast import algorithms, distributed
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.config.run import GradientSync
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode
from tests.algorithms import problems
from tests.algorithms.problems import VARIANTS, confident

# parity_kekmodel is not here: as in that code, each rank has its own difference.
CONFIGS = {name: config for name, config in VARIANTS.items() if name != "mpl parity_kekmodel"}
DDP = ["mpl difference", "uda", "smpl difference", "mpl exact"]
COMPILED = "mpl difference"
Ended = dict[str, Any]


def train(name: str, sync: GradientSync = "allreduce", compiled: Mode = "off") -> Ended:
    """Eight steps of this rank's share of each batch."""
    torch.manual_seed(0)

    def learner(config: LearnerConfig) -> Learner:
        # No batch norm: its batches would differ between 1 and 2 ranks.
        network = confident(problems.network())
        return Learner(network, config, steps=8, compiled=compiled, grad_sync=sync)

    algorithm = algorithms.build(CONFIGS[name], learner)
    rank, world = distributed.rank(), distributed.world_size()
    for t in range(8):
        local = Batch(*(field[rank::world] for field in problems.batch(t, 8, 12)))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            metrics = train_step(algorithm, local, t)
    state = {name: learner.state_dict() for name, learner in algorithm.learners.items()}
    return {
        "learners": {**state, "algorithm": dict(algorithm.state)},
        "feedback": metrics.get("feedback", torch.zeros(())),
        "collectives": reduced.call_count,
    }


def bad_batch() -> Ended:
    """Three steps, the second with one NaN on the second rank only."""
    network = lambda: problems.network(norm=True).float()  # noqa: E731
    algorithm = problems.new(VARIANTS["uda"], network, steps=20)
    states, skipped = [], []
    for t in range(3):
        batch = problems.as_dtype(problems.batch(2 * t + distributed.rank(), 4, 6), torch.float32)
        if t == 1 and distributed.rank() == 1:
            batch.weak[0, 0, 0, 0] = math.nan
        train_step(algorithm, batch, t)
        states.append(problems.state(algorithm))
        skipped.append(int(algorithm.learners["learner"].skipped))
    return {"states": states, "skipped": skipped}


def main(out: str) -> None:
    """Writes OUT.RANK."""
    rank = distributed.init("cpu").rank
    ended = {name: train(name) for name in CONFIGS}
    ended |= {f"ddp {name}": train(name, "ddp") for name in DDP}
    ended |= {"compiled": train(COMPILED, "ddp", "default"), "bad batch": bad_batch()}
    torch.save(ended, f"{out}.{rank}")
    distributed.shutdown()
    alive = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    # Such a thread may abort the process while Python ends.
    assert not any("gloo" in name for name in alive), alive


if __name__ == "__main__":
    main(sys.argv[1])
