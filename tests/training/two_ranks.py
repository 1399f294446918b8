"""Trains on made-up batches and saves the weights: run by test_two_ranks.py, alone and by torchrun.

usage: two_ranks.py OUT NAME [NAME ...] [--compile] [--ddp]
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from mpl_fast import algorithms, distributed
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.learner import Learner

LEARNER = LearnerConfig(lr=0.1, warmup=2, ema=0.9, dropout=0.0, max_grad_norm=1.0)
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=3, temperature=0.7, threshold=0.3)
MPL = MPLConfig(teacher=LEARNER, student=LEARNER, consistency=CONSISTENCY)
SMPL = SMPLConfig(learner=LEARNER, consistency=CONSISTENCY)
# parity_kekmodel is not here: like that code it hears each rank's own difference.
CONFIGS: dict[str, AlgorithmConfig] = {
    "supervised": SupervisedConfig(learner=LEARNER),
    "supervised mixup": SupervisedConfig(learner=LEARNER, mixup=1.0),
    "finetune": FinetuneConfig(learner=LEARNER, label_smoothing=0.1),
    "uda": UDAConfig(learner=LEARNER, consistency=CONSISTENCY),
    "uda cosine": UDAConfig(learner=LEARNER, consistency=replace(CONSISTENCY, measure="cosine")),
    "fixmatch": FixMatchConfig(learner=LEARNER, threshold=0.3),
    "mpl": MPL,
    "mpl baseline held_out": replace(MPL, baseline=0.9, held_out=0.5, label_threshold=0.3),
    "mpl sampled": replace(MPL, feedback="sampled"),
    "mpl per_example": replace(MPL, feedback="per_example"),
    "mpl exact": replace(MPL, feedback="exact", label_threshold=0.3, feedback_weight=10.0),
    "mpl exact split recompute": replace(
        MPL, feedback="exact", bn_batches="split", teacher_graph="recompute"
    ),
    "mpl parity_google": replace(MPL, feedback="parity_google", baseline=0.9),
    "mpl_roleplay": RolePlayConfig(
        teacher=LEARNER,
        student=LEARNER,
        consistency=CONSISTENCY,
        swap_every=3,
        student_delay_steps=1,
    ),
    "smpl": SMPL,
    "smpl exact": replace(SMPL, feedback="exact"),
    "metasemi": MetaSemiConfig(learner=LEARNER),
    "metasemi plain": MetaSemiConfig(learner=LEARNER, mixup=0.0, derivative="forward"),
}


def batches(steps: int) -> list[Batch]:
    """Whole batches; a rank takes every world-th row."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        labeled, weak = (torch.randn(n, 3, 12, 12, generator=g).double() for n in (8, 12))
        strong = weak + 0.5 * torch.randn(weak.shape, generator=g)
        labels, truth = (torch.randint(4, (n,), generator=g) for n in (8, 12))
        made.append(Batch(labeled, labels, weak, strong, truth))
    return made


def network() -> nn.Module:
    """No batch norm: its batches would differ between one rank and two."""
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 4)).double()


def train(recipe: str, out: str, options: set[str], place: distributed.DistEnv) -> None:
    torch.manual_seed(0)
    algorithm = algorithms.build(
        CONFIGS[recipe],
        lambda c: Learner(
            network(),
            c,
            steps=8,
            compiled="default" if "--compile" in options else "off",
            grad_sync="ddp" if "--ddp" in options else "allreduce",
        ),
    )
    for t, whole in enumerate(batches(8)):
        mine = Batch(*(field[place.rank :: place.world] for field in whole))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            metrics = train_step(algorithm, mine, t)
    h = metrics.get("feedback", torch.zeros(()))
    state = {name: learner.state_dict() for name, learner in algorithm.learners.items()}
    state["algorithm"] = dict(algorithm.state)
    ended = {"learners": state, "h": h, "collectives": reduced.call_count}
    torch.save(ended, f"{out}.{recipe}.{place.rank}")


def main(out: str, *options: str) -> None:
    place = distributed.init("cpu")
    for recipe in options:
        if not recipe.startswith("--"):
            train(recipe, out, {*options}, place)
    distributed.shutdown()
    alive = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    # Such a thread may abort the process while Python ends.
    assert not any("gloo" in name for name in alive), alive


if __name__ == "__main__":
    main(*sys.argv[1:])
