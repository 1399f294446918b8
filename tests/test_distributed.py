"""With one rank everything is the identity; two ranks average, gather and agree by gloo."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import is_nccl_available
from torch.multiprocessing.spawn import spawn

from mpl_fast import distributed
from mpl_fast.distributed import StopFlag
from mpl_fast.errors import ConfigError, LostRankError


def test_alone_everything_is_the_identity() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(distributed.mean_over_ranks(x), x) and x.requires_grad
    assert not distributed.mean_over_ranks(x).requires_grad
    assert distributed.all_gather_object("a") == ["a"] and distributed.broadcast_object(3) == 3
    stop = StopFlag()
    assert not stop.should_stop()
    stop.request()
    assert stop.should_stop()


def test_cuda_asked_for_and_absent_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is cuda, but torch finds no GPU here"):
        distributed.init("cuda")


def test_a_world_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train alone on its share of the data."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="use torchrun"):
        distributed.init("cpu")


def test_more_ranks_than_gpus_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks for 1 GPUs here: use --nproc-per-node=1"):
        distributed.init("cuda")


def test_restarted_ranks_do_not_find_the_addresses_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is torchrun's, which outlives them."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = []
    for restart in ("0", "1", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        store = distributed._store()
        found.append(store.check(["address"]))
        store.set("address", restart)
    assert found == [False, False, True]


@pytest.mark.parametrize(
    ("world", "local", "machines"),
    [(None, None, 1), ("8", None, 1), ("8", "8", 1), ("16", "8", 2), ("12", "8", 2)],
)
def test_machines_follow_from_the_launcher(
    world: str | None, local: str | None, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, as in a dry run for WORLD_SIZE ranks, there is one."""
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert distributed.machines() == machines


def test_pytorch_has_the_flight_recorders() -> None:
    """By names without a promise; NCCL's is only in builds for CUDA."""
    for name in ("_dump_fr_trace", *(["_dump_nccl_trace"] if is_nccl_available() else [])):
        assert hasattr(torch._C._distributed_c10d, name)
    assert distributed.traces() == {}


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    x = torch.tensor([float(rank), 2.0])
    assert distributed.mean_over_ranks(x).tolist() == [0.5, 2.0]
    assert distributed.sum_over_ranks(x).tolist() == [1.0, 4.0]
    many = [torch.full((2, 2), float(rank)), torch.tensor(float(10 * rank))]
    distributed.mean_over_ranks_(many)
    assert many[0].tolist() == [[0.5, 0.5], [0.5, 0.5]] and many[1].item() == 5.0
    assert distributed.all_gather_object(f"r{rank}") == ["r0", "r1"]
    assert distributed.broadcast_object(f"r{rank}") == "r0"
    stop = StopFlag()
    votes = []
    for step in range(5):
        if rank == 1 and step == 2:
            stop.request()
        votes.append(stop.should_stop())
    Path(folder, f"votes{rank}").write_text(str(votes))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_average_and_decide_together(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path),), nprocs=2)
    votes = [(tmp_path / f"votes{rank}").read_text() for rank in (0, 1)]
    # Requested by one rank at step 2, agreed by all at step 3.
    assert votes[0] == votes[1] == str([False, False, False, True, True])


def _left_alone(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    distributed.barrier()
    if rank == 1:
        os._exit(0)  # as by a SIGKILL: it leaves no word
    with pytest.raises(LostRankError) as lost, distributed.lost_ranks("RUN"):
        for _ in range(100):
            distributed.sum_over_ranks(torch.ones(1))
    Path(folder, "error").write_text(str(lost.value))
    with pytest.raises(RuntimeError, match="another"), distributed.lost_ranks("RUN"):
        raise RuntimeError("another")
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_has_ended_is_one_line(tmp_path: Path) -> None:
    spawn(_left_alone, args=(str(tmp_path),), nprocs=2)
    error = (tmp_path / "error").read_text()
    assert re.fullmatch(
        r"rank 0 of 2 on \S+ has lost another rank \((Connection .* by peer|Broken pipe)\): that "
        "one was killed, or has printed its reason; the same command resumes RUN",
        error,
    )
