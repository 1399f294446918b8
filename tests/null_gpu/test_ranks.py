"""Two ranks: steps of every recipe exchange the same in the same order, and do not wait."""

import json
import pickle
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import distributed as ddp

from mpl_fast import distributed, models
from mpl_fast.algorithms.base import train_step
from mpl_fast.config import AlgorithmConfig
from mpl_fast.config.run import GradientSync
from tests.null_gpu import machine
from tests.null_gpu.test_step_graphs import GRAPHED, steps

pytestmark = pytest.mark.slow
STEPS = 2
# DDP times steps until the tenth, which waits for events.
WARMUP: dict[GradientSync, int] = {"allreduce": 3, "ddp": 11}
DDP = ("supervised", "uda", "fixmatch", "mpl difference", "mpl exact", "mpl_roleplay", "smpl exact",
       "metasemi")  # fmt: skip
NORM_SYNC = ("mpl difference", "mpl exact")  # with batch norm over both ranks
VARIANT = "mpl difference"  # in which faults are injected
Found = dict[str, Any]


def _larger(flat: Tensor) -> None:
    dist.all_reduce(torch.cat([flat, flat[:1]]))


def _of_another_type(flat: Tensor) -> None:
    dist.all_reduce(flat.double())


def _maximum(flat: Tensor) -> None:
    dist.all_reduce(flat, dist.ReduceOp.MAX)


def _twice(flat: Tensor) -> None:
    dist.all_reduce(flat)
    dist.all_reduce(flat)


def _never(flat: Tensor) -> None:
    """One collective fewer."""


def _later(flat: Tensor) -> None:
    """After the next one."""
    _held.append(flat)
    if len(_held) > 1:
        dist.all_reduce(_held.pop())
        dist.all_reduce(_held.pop())


def _waits(flat: Tensor) -> None:
    dist.all_reduce(flat)
    torch.cuda.current_stream().synchronize()


_held: list[Tensor] = []
FAULTS = (_larger, _of_another_type, _maximum, _twice, _never, _later)


def measure() -> Found:
    """What this rank's steps exchanged; in a process on the null GPU."""
    from tests.null_gpu.training import ALL

    distributed.init("cuda")
    found: Found = {"allreduce": {name: exchange(of, "allreduce") for name, of in ALL.items()}}
    found["ddp"] = {name: exchange(ALL[name], "ddp") for name in DDP}
    found["norm sync"] = {name: exchange(ALL[name], "allreduce", normed) for name in NORM_SYNC}
    found["step"] = {name: steps(name) for name in GRAPHED}
    distributed.barrier()
    entries = {name: pickle.loads(trace)["entries"] for name, trace in distributed.traces().items()}
    found["recorded"] = {name: of[-1]["profiling_name"] for name, of in entries.items() if of}
    injected = (*FAULTS, _waits)
    return found | {fault.__name__: _injected(fault, ALL[VARIANT]) for fault in injected}


def normed() -> nn.Module:
    """A network with batch norm over both ranks."""
    return models.synchronized(models.build("wrn_10_1", 10, dropout=0.1))


def exchange(
    config: AlgorithmConfig, sync: GradientSync, network: Callable[[], nn.Module] | None = None
) -> Found:
    """Faults and collectives of a recipe's steps."""
    from tests.null_gpu.training import batch, new, watched

    # DDP checks what ranks have gathered, which the null GPU does not give.
    with mock.patch.object(ddp, "_verify_param_shape_across_processes"):
        algorithm, images = new(config, network=network, grad_sync=sync), batch()

    def steps(first: int, last: int) -> None:
        for t in range(first, last):
            train_step(algorithm, images, t)

    steps(0, WARMUP[sync])
    faults, seen = watched(lambda: steps(WARMUP[sync], WARMUP[sync] + STEPS))
    return {"faults": faults, "collectives": seen.lines("KERNEL nccl")}


def _injected(fault: Callable[[Tensor], None], config: AlgorithmConfig) -> Found:
    """Steps with a fault in the second rank's all-reduces."""

    class Wrong:
        """torch.distributed with the fault."""

        all_reduce = staticmethod(fault)

        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

    _held.clear()
    faulty = Wrong() if distributed.rank() else dist
    with mock.patch.object(distributed, "dist", faulty):
        return exchange(config, "allreduce")


def different(collectives: Sequence[Sequence[str]]) -> list[str]:
    """Collectives in which two ranks differ."""
    return [f"{a}, but {b}" for a, b in zip_longest(*collectives) if a != b]


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    """What `measure` found on each rank."""
    found: list[Found] = json.loads(machine.run("tests.null_gpu.test_ranks", ranks=2))
    return found


@pytest.mark.parametrize("how", [*WARMUP, "norm sync"])
def test_ranks_exchange_the_same_in_the_same_order_and_do_not_wait(
    how: str, ranks: list[Found]
) -> None:
    for name in ranks[0][how]:
        pair = [rank[how][name] for rank in ranks]
        assert [of["faults"] for of in pair] == [[], []], name
        assert different([of["collectives"] for of in pair]) == [], name
        assert pair[0]["collectives"], name


def test_a_hang_would_show_the_latest_exchange(ranks: list[Found]) -> None:
    """Of the CPU and of the GPU."""
    for rank in ranks:
        latest = {name: exchange.split(":")[-1] for name, exchange in rank["recorded"].items()}
        assert latest == {"gloo": "all_reduce", "nccl": "all_reduce"}


def test_a_step_has_at_most_three_all_reduces(ranks: list[Found]) -> None:
    for name, of in ranks[0]["allreduce"].items():
        assert len(of["collectives"]) <= 3 * STEPS, name


def test_graphs_of_steps_hold_the_exchange(ranks: list[Found]) -> None:
    for name in GRAPHED:
        pair = [rank["step"][name] for rank in ranks]
        assert [of["faults"] for of in pair] == [[], []], name
        assert different([of["collectives"] for of in pair]) == [], name
        assert pair[0]["captures"] == pair[1]["captures"] > 0, name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_rank_that_exchanges_something_else_is_found(
    fault: Callable[[Tensor], None], ranks: list[Found]
) -> None:
    assert different([rank[fault.__name__]["collectives"] for rank in ranks])


def test_a_rank_that_waits_is_found(ranks: list[Found]) -> None:
    right, wrong = (rank["_waits"] for rank in ranks)
    assert not right["faults"]
    assert any("synchronizing" in line for line in wrong["faults"])


if __name__ == "__main__":
    of_all = distributed.all_gather_object(measure())
    if distributed.rank() == 0:
        print(json.dumps(of_all))
    distributed.shutdown()
