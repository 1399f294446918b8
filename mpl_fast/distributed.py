"""Communication between ranks: all of it is in this file. With one process every function is the
identity."""

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_group as _default_group
from torch.distributed.rendezvous import rendezvous

from mpl_fast.errors import ConfigError, LostRankError

TIMEOUT = timedelta(minutes=10)  # of a collective, and to meet the other ranks
# In errors of gloo and NCCL when another rank has ended.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)
LONG_SECONDS = 1800.0  # at least, for the first steps, compilation and evaluations' starts


@dataclass(frozen=True)
class DistEnv:
    """Rank, number of ranks and device of this process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Rank 0 alone prints and writes shared files."""
        return self.rank == 0


def ranks_of_launcher() -> tuple[int, int]:
    """Rank and number of ranks as torchrun set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Rank on this machine as torchrun set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def machines() -> int:
    """Number of machines if all have as many ranks as this one; else it is rounded up."""
    _, world = ranks_of_launcher()
    return -(-world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))  # set by torchrun


def cores_per_rank() -> int:
    """This rank's share of the cores that its machine's ranks may use."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def long_timeout(hang_timeout: float) -> float:
    """Seconds that compilation and the like may take, if a step may take `hang_timeout`."""
    return max(3 * hang_timeout, LONG_SECONDS)


def init(device: str, hang_timeout: float = 0.0) -> DistEnv:
    """Initializes the process group (gloo for CPU tensors, NCCL for CUDA ones) under torchrun.

    With `hang_timeout`, the watchdog's, collectives fail later than the watchdog ends the process.

    A process joins it once: later calls use the same group, until `shutdown`, after which it cannot
    join again. `device` is ``auto``, ``cpu`` or ``cuda``. Raises `ConfigError` for CUDA without a
    GPU for every local rank, and for a WORLD_SIZE that no launcher has set.
    """
    rank, world = ranks_of_launcher()
    dist_env = DistEnv(rank, world, _device(device))
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if world > 1 and not launched:
        raise ConfigError(f"WORLD_SIZE is {world} without RANK and MASTER_ADDR: use torchrun")
    if launched and not dist.is_initialized():
        # Optimizers import torch._dynamo at their first step. Imported after the group is made it
        # holds a reference to it: gloo's threads then outlive `shutdown`, and sometimes abort the
        # process when Python exits.
        importlib.import_module("torch._dynamo")
        cuda = dist_env.device.type == "cuda"
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        later = timedelta(seconds=long_timeout(hang_timeout) + 60)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store(),
            rank=rank,
            world_size=world,
            timeout=later if hang_timeout else TIMEOUT,
        )
    return dist_env


def _store() -> Store:
    """The launcher's key-value store, by which ranks find each other.

    A torchrun that restarts its ranks keeps its store, in which they would find the addresses of
    the ranks before (pytorch issue 135712): each restart has keys of its own.
    """
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store  # made by the first rank, for this group only


def shutdown() -> None:
    """Destroys the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU here: use --device cpu or auto")
    ranks, have = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > have:  # raised by every rank of this machine, of which the first prints it
        raise ConfigError(f"{ranks} ranks for {have} GPUs here: use --nproc-per-node={have}")
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


@contextmanager
def lost_ranks(run_dir: str) -> Iterator[None]:
    """Turns an error of a collective whose other ranks have ended into a `LostRankError`."""
    try:
        yield
    except RuntimeError as error:
        reason = next((words for words in LOST if words in str(error)), None)
        if reason is None or world_size() == 1:
            raise
        raise LostRankError(
            f"rank {rank()} of {world_size()} on {socket.gethostname()} has lost another rank "
            f"({reason}): that one was killed, or has printed its reason; the same command resumes "
            f"{run_dir}"
        ) from error


def traces() -> dict[str, bytes]:
    """By backend, gloo and nccl, the latest 2,000 exchanges of this rank as PyTorch's flight
    recorders have them, for `torchfrtrace`; empty with one process."""
    if not dist.is_initialized():
        return {}
    c10d: Any = torch._C._distributed_c10d
    found: dict[str, bytes] = {"gloo": c10d._dump_fr_trace()}
    if "nccl" in dist.get_backend_config():
        # Named "nccl2" by PyTorch 2.15, "nccl" by those before, with a recorder of its own.
        name = _default_group()._get_backend(torch.device("cuda")).name()
        old = name == "nccl"
        found["nccl"] = c10d._dump_nccl_trace() if old else c10d._dump_fr_trace(backend=name)
    return found


_waited = 0.0


def _timed(exchange: Callable[..., object], *arguments: Any) -> None:
    """Calls and times it; what PyTorch compiles, where batch norm may have one, is not timed."""
    global _waited
    if torch.compiler.is_compiling():
        exchange(*arguments)
        return
    began = time.perf_counter()
    exchange(*arguments)
    _waited += time.perf_counter() - began


def seconds_waited() -> float:
    """Seconds that this process has spent in exchanges; on a GPU, in queueing them."""
    return _waited


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """All-reduced mean of a tensor, detached; on CUDA without a host synchronization."""
    x = sum_over_ranks(x)
    if world_size() > 1:
        x /= world_size()
    return x


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Averages tensors in place with a single all-reduce, in the widest of their dtypes."""
    if world_size() == 1 or not tensors:
        return
    rows = [_in_memory_order(t) for t in tensors]
    flat = torch.cat([row.flatten() for row in rows])
    _timed(dist.all_reduce, flat)
    flat /= world_size()
    chunks = flat.split([row.numel() for row in rows])
    torch._foreach_copy_(rows, [c.view(row.shape) for c, row in zip(chunks, rows, strict=True)])


def _in_memory_order(x: Tensor) -> Tensor:
    """A view with the dimensions in memory order, so that flattening makes no copy."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.detach().permute(0, 2, 3, 1)
    return x.detach()


def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduced sum of a tensor, detached."""
    x = x.detach().clone()
    if world_size() > 1:
        _timed(dist.all_reduce, x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Every rank's tensor, detached: ``(ranks, ...)`` in the order of ranks."""
    x = x.detach()
    if world_size() == 1:
        return x[None]
    found = x.new_empty(world_size() * x.numel())
    _timed(dist.all_gather_into_tensor, found, x.flatten())
    return found.view(world_size(), *x.shape)


def barrier() -> None:
    """Blocks until every rank calls it, by an all-reduce of a CPU tensor."""
    sum_over_ranks(torch.zeros(1))


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's picklable value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _timed(dist.all_gather_object, values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value."""
    return all_gather_object(value)[0]


class StopFlag:
    """Asynchronous all-reduce of a stop request: all ranks agree one step after it.

    The all-reduce is of one integer over gloo and is awaited in the next step, so it costs a step
    nothing and never synchronizes with the GPU.
    """

    def __init__(self) -> None:
        self.requested = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def request(self) -> None:
        """Requests a stop; safe in a signal handler."""
        self.requested = True

    def should_stop(self) -> bool:
        """Must be called once a step on every rank: true on all of them or on none."""
        if world_size() == 1:
            return self.requested
        stopping = False
        if self._work is not None:
            _timed(self._work.wait)
            stopping = bool(self._flag.item())
        self._flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return stopping
