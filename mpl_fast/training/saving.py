"""One checkpoint on its way to the disk, in a thread of each rank.

Training waits for a copy of its state in host memory; on a GPU only the device does, and the host
goes on with the next step. Ranks complete a checkpoint by files: each writes its part and then a
list of it, and the first, which has seen all lists, publishes. A collective in a thread would need
a process group of its own, and would wait for a rank that has ended.
"""

import copy
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpl_fast import atomic
from mpl_fast.distributed import TIMEOUT
from mpl_fast.errors import UserError
from mpl_fast.training.console import quantity
from mpl_fast.untrusted import json_value

State = dict[str, Any]
Copy = tuple[Tensor, Tensor]  # to and from
Files = dict[str, dict[str, Any]]  # by name: bytes and sha256
POLL = 0.01  # seconds between two looks for the files of other ranks
FOLLOW = 1.0  # seconds between two looks for how far the first rank is
GRACE = 5.0  # seconds for them at the end of a run that has failed


class HostCopy:
    """A copy of a state in host memory, which is pinned for tensors of a GPU.

    Each copy overwrites the one before, since new memory costs page faults, or pinning.
    """

    def __init__(self) -> None:
        self._buffers = dict[tuple[Any, ...], Tensor]()
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, state: State) -> State:
        """Copies the tensors in dicts, lists and tuples; what it returns is valid after `wait`.

        A GPU copies in the queue of its steps, after those before and before those that follow,
        which may change the tensors: the host does not wait.
        """
        copies = list[Copy]()
        copied: State = self._copy(state, (), copies)
        _copy_by_threads(copies)
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Until the latest copy is complete; in any thread."""
        if self._copied is not None:
            # A thread begins on the first GPU, and would take memory there.
            with torch.cuda.device(self._copied.device):
                self._copied.synchronize()

    def _copy(self, value: Any, place: tuple[Any, ...], copies: list[Copy]) -> Any:
        """The copy of a value; tensors of the CPU are only added to `copies`."""
        if isinstance(value, dict):
            copied = copy.copy(value)  # with the attributes of a module's state dict
            for key, part in value.items():
                copied[key] = self._copy(part, (*place, key), copies)
            return copied
        if isinstance(value, list | tuple):
            parts = enumerate(value)
            return type(value)(self._copy(part, (*place, i), copies) for i, part in parts)
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(place)
        if buffer is None or not _alike(buffer, value):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[place] = buffer
        if value.is_cuda:
            return buffer.copy_(value, non_blocking=True)
        copies.append((buffer, value))
        return buffer


def _copy_by_threads(copies: list[Copy]) -> None:
    """Copies in as many threads as PyTorch uses, each with its share of the bytes.

    There are hundreds of tensors: on busy cores, threads that share every one of them, and wait for
    each other after it, take many times as long.
    """
    threads = torch.get_num_threads()
    shares, sizes = [list[Copy]() for _ in range(threads)], [0] * threads
    for pair in sorted(copies, key=lambda pair: pair[1].nbytes, reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(pair)
        sizes[least] += pair[1].nbytes
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_copy_all, shares))
    finally:
        torch.set_num_threads(threads)


def _copy_all(copies: list[Copy]) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():  # is of one thread
        for buffer, value in copies:
            buffer.copy_(value)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


class Saving:
    """Writes one rank's files to the folder `partial`, of which the first rank then publishes all.

    A thread does it, from the beginning. `states` are written under their names, once `ready` has
    returned; `failed` is called with the step and the reason of a failure.
    """

    def __init__(
        self,
        step: int,
        partial: Path,
        states: Mapping[str, State],
        *,
        rank: int,
        world: int,
        ready: Callable[[], None],
        publish: Callable[[Files], None],
        failed: Callable[[int, str], None],
        progressed: Callable[[], None],
    ) -> None:
        self.step, self.partial = step, partial
        self.failure = ""
        """Why the checkpoint, or this rank's part, was not written."""
        self._states, self._rank, self._world = states, rank, world
        self._ready, self._publish, self._failed = ready, publish, failed
        self._progressed = progressed
        self._part_ended, self._given_up = threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._ready()
            files = self._write_part()
            self._part_ended.set()
            if self._rank == 0 and self._collect(files):
                self._progressed()
                self._publish(files)
        except (OSError, UserError) as error:
            self.failure = str(error)
            if isinstance(error, OSError):
                self.failure = f"{error.strerror or error} ({error.filename or self.partial})"
            self._failed(self.step, self.failure)
        except BaseException as error:
            self._fault = error
        finally:
            self._part_ended.set()
        if self._rank > 0:
            with suppress(OSError):
                self._follow()

    def _write_part(self) -> Files:
        self.partial.mkdir(exist_ok=True)
        check_space(self.partial, self._states)
        files = {}
        for name, state in self._states.items():
            files[name] = _write(self.partial / name, state, self._progressed)
            self._progressed()
        if self._rank > 0:
            atomic.write_json(self._list_of(self._rank), files)
        return files

    def _list_of(self, rank: int) -> Path:
        return self.partial / f"rank_{rank}.json"

    def _collect(self, files: Files) -> bool:
        """Adds the files of other ranks; whether all of them have come."""
        self._deadline = min(self._deadline, time.monotonic() + TIMEOUT.total_seconds())
        for rank in range(1, self._world):
            part = self._list_of(rank)
            while not part.exists():
                if self._given_up.wait(POLL):
                    return False
                if time.monotonic() > self._deadline:
                    raise TimeoutError(None, f"rank {rank} has not written its part", str(part))
            files |= json_value(part.read_text())
            part.unlink()
        return True

    def _follow(self) -> None:
        """Reports progress while files of the checkpoint grow, until it has its name."""
        before = 0
        while not self._given_up.wait(FOLLOW):
            try:
                size = sum(file.stat().st_size for file in self.partial.iterdir())
            except FileNotFoundError:  # a file or the folder has got its name
                if not self.partial.exists():
                    return
                size = -1
            if size != before:
                self._progressed()
            before = size

    def wait_for_part(self) -> None:
        """Waits until this rank has written its part, or has failed to."""
        self._part_ended.wait()
        self._raise_fault()

    def wait(self, *, give_up: bool = False) -> None:
        """Waits to the end; `give_up`: without what other ranks have not written."""
        if give_up:
            self._given_up.set()
        self._thread.join()
        self._raise_fault()

    def close(self) -> None:
        """Waits at most `GRACE` seconds for the parts of other ranks, which may have ended."""
        self._deadline = time.monotonic() + GRACE
        if self._rank > 0:
            self._given_up.set()
        self._thread.join()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault


def check_space(folder: Path, state: Mapping[str, Any]) -> None:
    """Raises `OSError` if the disk has too little space for a checkpoint with this shared state."""
    need, disk = state_bytes(state), shutil.disk_usage(folder)
    if disk.free < need and disk.total:  # some network file systems do not know
        have = f"it needs {quantity(need, 'B')}, and {quantity(disk.free, 'B')} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {have}", str(folder))


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0


def _write(path: Path, state: State, synced: Callable[[], None]) -> dict[str, Any]:
    """Saves with torch.save; returns the size and checksum for checkpoint.json."""
    with atomic.atomic_file(path, synced) as file:
        torch.save(state, file)
    return {"bytes": file.size, "sha256": file.sha256}
