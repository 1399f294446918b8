"""Two ranks with half the batch each end where one rank with all of it does, also in turn.

Under torchrun this file trains, and saves how each training ended.
"""

import functools
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpl_fast import algorithms, distributed, models
from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.config.run import GradientSync
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode
from mpl_fast.training.state import restore
from tests.algorithms import problems
from tests.algorithms.problems import VARIANTS, assert_same, confident
from tests.tiny_run import launch

pytestmark = pytest.mark.slow
# parity_kekmodel is not here: as in that code, each rank has its own difference.
CONFIGS = {name: config for name, config in VARIANTS.items() if name != "mpl parity_kekmodel"}
CONFIGS["mpl exact delayed trunks"] = problems.DELAYED_TRUNKS
DDP = ["mpl difference", "uda", "smpl difference", "mpl exact", "mpl exact delayed trunks"]
# With batch norm over both ranks. Of a feedback each normalizes the labeled loss by itself.
NORMED = ["supervised", "uda", "uda split", "fixmatch", "mpl off", "smpl off"]
COMPILED = "mpl difference"
Ended = dict[str, Any]
WITH_FEEDBACK = [name for name in CONFIGS if "mpl" in name and " off" not in name]
# Of a skipped step: counters of batches go on, the average follows, and the rate is the step's.
CHANGES = ("tracked", "average", "lr")
assert_close = functools.partial(assert_same, rtol=1e-6, atol=1e-8)
Pair = tuple[dict[str, Ended], dict[str, Ended]]


class Network(problems.Network):
    """PyTorch 2.11 compiles no plain nn.Sequential in place."""

    def forward(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input


def train(
    name: str,
    sync: GradientSync = "allreduce",
    compiled: Mode = "off",
    *,
    norm: bool = False,
    begin: int = 0,
    end: int = 8,
    before: Ended | None = None,
) -> Ended:
    """Eight steps of this rank's share of each batch; `norm`: with batch norm over all ranks.

    Or the steps from `begin`, after what training up to there returned, to `end`.
    """
    torch.manual_seed(0)

    def learner(config: LearnerConfig) -> Learner:
        # No other batch norm: its batches would differ between 1 and 2 ranks.
        network: nn.Module = Network(*confident(problems.network(norm=norm)))
        if distributed.world_size() > 1:
            network = models.synchronized(network)
        return Learner(network, config, steps=8, compiled=compiled, grad_sync=sync)

    context = AlgorithmContext(classes=problems.CLASSES)
    algorithm = algorithms.build(CONFIGS[name], learner, context)
    if before:
        restore(algorithm, before["shared"], Path())
    rank, world = distributed.rank(), distributed.world_size()
    for t in range(begin, end):
        local = Batch(*(field[rank::world] for field in problems.batch(t, 8, 12)))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            metrics = train_step(algorithm, local, t)
    state = {name: learner.state_dict() for name, learner in algorithm.learners.items()}
    return {
        "learners": {**state, "algorithm": dict(algorithm.state)},
        "shared": {"learners": state, "algorithm": dict(algorithm.state)},
        "feedback": metrics.get("feedback", torch.zeros(())),
        "collectives": reduced.call_count,
    }


def normalized() -> nn.Module:
    return problems.network(norm=True).float()


def bad_batch() -> Ended:
    """Three steps, the second with one NaN on the second rank only."""
    algorithm = problems.new(VARIANTS["uda"], normalized, steps=20)
    states, skipped = [], []
    for t in range(3):
        batch = problems.as_dtype(problems.batch(2 * t + distributed.rank(), 4, 6), torch.float32)
        if t == 1 and distributed.rank() == 1:
            batch.weak[0, 0, 0, 0] = math.nan
        train_step(algorithm, batch, t)
        states.append(problems.state(algorithm))
        skipped.append(int(algorithm.learners["learner"].skipped))
    return {"states": states, "skipped": skipped}


def compiled() -> Ended:
    """Training with DDP, whose first bucket is full with the last layer, and compiled networks."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1):
        ended = train(COMPILED, "ddp", "default")
    return ended | {"pieces": torch._dynamo.utils.counters["aot_autograd"]["total"]}


def main(out: str) -> None:
    """Writes OUT.RANK."""
    rank = distributed.init("cpu").rank
    ended = {name: train(name) for name in CONFIGS}
    ended |= {f"ddp {name}": train(name, "ddp") for name in DDP}
    ended |= {f"norm {name}": train(name, norm=True) for name in [*NORMED, "mpl exact"]}
    ended |= {"compiled": compiled(), "bad batch": bad_batch()}
    begun = torch.load(f"{out}.begun", weights_only=True)
    ended |= {f"then {n}": train(n, begin=3, end=6, before=begun[n]) for n in begun}
    torch.save(ended, f"{out}.{rank}")
    distributed.shutdown()
    alive = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    # Such a thread may abort the process while Python ends.
    assert not any("gloo" in name for name in alive), alive


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """What `main` saved, by rank."""
    out = tmp_path_factory.mktemp("pair") / "state"
    torch.save({name: train(name, end=3) for name in DDP}, f"{out}.begun")
    done = launch("tests.training.test_two_ranks", str(out))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_equals_two(name: str, pair: Pair) -> None:
    one, first, second = train(name), pair[0][name], pair[1][name]
    assert_close(first["learners"], one["learners"])
    assert_close(second["learners"], first["learners"])
    if name in WITH_FEEDBACK:
        assert one["feedback"].abs() > 1e-6
        mean = (first["feedback"] + second["feedback"]) / 2
        torch.testing.assert_close(mean, one["feedback"])


@pytest.mark.parametrize("name", DDP)
def test_one_rank_then_two_then_one_end_as_one(name: str, pair: Pair) -> None:
    """All that a run continues from on another number of ranks is what ranks share."""
    for rank in pair:
        ended = train(name, begin=6, before=rank[f"then {name}"])
        assert_close(ended["learners"], train(name)["learners"])


@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_over_two_ranks_equals_that_of_one(name: str, pair: Pair) -> None:
    one, first, second = (train(name, norm=True), *(ended[f"norm {name}"] for ended in pair))
    assert_close(first["learners"], one["learners"])
    assert_close(second["learners"], first["learners"])


def test_ranks_end_alike_where_the_feedback_is_normalized_by_each_alone(pair: Pair) -> None:
    first, second = (ended["norm mpl exact"] for ended in pair)
    assert_close(second["learners"], first["learners"])


def test_compiled_networks_under_ddp_equal_eager_ones(pair: Pair) -> None:
    """Those with gradient are in two pieces, so that DDP can exchange the gradient of one during
    the backward pass of the other."""
    assert_close(pair[0]["compiled"]["learners"], pair[0][COMPILED]["learners"])
    assert pair[0]["compiled"]["pieces"] == 5  # of teacher, student, and student without gradient


@pytest.mark.parametrize("name", DDP)
def test_ddp_and_the_flat_exchange_end_alike(name: str, pair: Pair) -> None:
    assert_close(pair[0][f"ddp {name}"]["learners"], pair[0][name]["learners"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_at_most_three_collectives(name: str, pair: Pair) -> None:
    """Gradients and statistics of a learner together, one for each update, and the feedback's; of
    FixMatch, the moving averages of alignment, and then those of adaptive thresholds."""
    recipe = name.split()[0]
    updates = {"mpl": 2, "mpl_roleplay": 2, "smpl": 2}.get(recipe, 1)
    # The direction of metasemi and of a derivative, or the difference.
    of_feedback = name in WITH_FEEDBACK or recipe == "metasemi"
    averages = 2 if name == "fixmatch adaptive" else 0
    assert pair[0][name]["collectives"] == updates + of_feedback + averages


def test_a_bad_batch_on_one_rank_is_skipped_on_both(pair: Pair) -> None:
    first, second = (rank["bad batch"] for rank in pair)
    assert first["skipped"] == second["skipped"] == [0, 1, 0]
    before, after, end = first["states"]
    assert_same(after, before, ignore=CHANGES)
    assert_same(second["states"][2], end, ignore=CHANGES)
    weights = [state["learner"]["network"]["0.weight"] for state in (after, end)]
    assert not torch.equal(*weights)


if __name__ == "__main__":
    main(sys.argv[1])
