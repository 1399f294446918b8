"""Trains on made-up batches and saves the weights: run by test_two_ranks.py, alone and by torchrun.

usage: two_ranks.py OUT NAME [NAME ...] [--compile] [--ddp]
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from mpl_fast import algorithms, distributed
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.learner import Learner
from tests.algorithms.problems import VARIANTS, batch, confident, network

# parity_kekmodel is not here: as in that code, each rank has its own difference.
CONFIGS = {name: config for name, config in VARIANTS.items() if name != "mpl parity_kekmodel"}


def train(recipe: str, out: str, options: set[str], dist_env: distributed.DistEnv) -> None:
    torch.manual_seed(0)
    algorithm = algorithms.build(
        CONFIGS[recipe],
        lambda c: Learner(
            confident(network()),  # no batch norm: its batches would differ between 1 and 2 ranks
            c,
            steps=8,
            compiled="default" if "--compile" in options else "off",
            grad_sync="ddp" if "--ddp" in options else "allreduce",
        ),
    )
    for t in range(8):
        local = Batch(*(field[dist_env.rank :: dist_env.world] for field in batch(t, 8, 12)))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            metrics = train_step(algorithm, local, t)
    feedback = metrics.get("feedback", torch.zeros(()))
    state = {name: learner.state_dict() for name, learner in algorithm.learners.items()}
    state["algorithm"] = dict(algorithm.state)
    ended = {"learners": state, "feedback": feedback, "collectives": reduced.call_count}
    torch.save(ended, f"{out}.{recipe}.{dist_env.rank}")


def main(out: str, *options: str) -> None:
    dist_env = distributed.init("cpu")
    for recipe in options:
        if not recipe.startswith("--"):
            train(recipe, out, {*options}, dist_env)
    distributed.shutdown()
    alive = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    # Such a thread may abort the process while Python ends.
    assert not any("gloo" in name for name in alive), alive


if __name__ == "__main__":
    main(*sys.argv[1:])
