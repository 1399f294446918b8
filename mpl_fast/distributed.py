"""The only file that talks to other ranks. With one process every function is the identity."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpl_fast.errors import ConfigError

TIMEOUT = timedelta(
    minutes=10
)  # of one collective; the slowest wait is another rank's first compile


@dataclass(frozen=True)
class DistEnv:
    """Where this process runs."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0 is the only one that talks and writes shared files."""
        return self.rank == 0


def start(device: str) -> DistEnv:
    """Joins the other ranks (gloo for CPU tensors, NCCL for CUDA ones) if torchrun started several.

    `device` is ``auto``, ``cpu`` or ``cuda``. Raises `ConfigError` if CUDA is asked for and absent.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dist_env = DistEnv(rank, world, _device(device, local_rank, local_world))
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if world > 1 and not launched:
        raise ConfigError(f"WORLD_SIZE is {world} without RANK and MASTER_ADDR: use torchrun")
    if launched:
        # Optimizers import it at their first step. Imported after the group is made it holds on to
        # it: gloo's threads then outlive `stop`, and sometimes abort the process as Python ends.
        importlib.import_module("torch._dynamo")
        cuda = dist_env.device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return dist_env


def stop() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(wanted: str, local_rank: int, local_world: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here: use --device cpu or auto")
    have = torch.cuda.device_count()
    if local_world > have:  # every rank of this machine sees it, so that rank 0 can tell
        raise ConfigError(f"{local_world} ranks for {have} GPUs here: use --nproc-per-node={have}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """A tensor's average over all ranks, off the autograd graph; on CUDA nothing waits for it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Averages many tensors in place with a single all-reduce; of one type, or it is the widest."""
    if world_size() == 1 or not tensors:
        return
    rows = [_in_memory_order(t) for t in tensors]
    flat = torch.cat([row.flatten() for row in rows])
    dist.all_reduce(flat)
    flat /= world_size()
    chunks = flat.split([row.numel() for row in rows])
    torch._foreach_copy_(rows, [c.view(row.shape) for c, row in zip(chunks, rows, strict=True)])


def _in_memory_order(x: Tensor) -> Tensor:
    """The same memory with its dimensions in an order in which flattening is no copy."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.detach().permute(0, 2, 3, 1)
    return x.detach()


def sum_over_ranks(x: Tensor) -> Tensor:
    """A tensor's sum over all ranks."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Waits until every rank is here, by a host-side all-reduce."""
    sum_over_ranks(torch.zeros(1))


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's picklable value."""
    return gather(value)[0]


class StopFlag:
    """A wish to stop on any rank becomes, one step later, a decision of all.

    The all-reduce is of one host integer over gloo and is awaited a step after it was begun, so it
    costs a step nothing and never waits for the GPU.
    """

    def __init__(self) -> None:
        self.requested = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def request(self) -> None:
        """Called from a signal handler, so it only notes the wish."""
        self.requested = True

    def agreed(self) -> bool:
        """Call once a step on every rank: true on all of them or on none."""
        if world_size() == 1:
            return self.requested
        decided = False
        if self._work is not None:
            self._work.wait()
            decided = bool(self._flag.item())
        self._flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return decided
