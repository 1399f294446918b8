"""Counts of one piece of work: operator calls, bytes, GPU launches, host syncs, collectives."""

import math
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench.clock import Work, wait_for_gpu

ROOT = Path(__file__).resolve().parents[2]
# Operators that return another view of the same memory, or memory that nothing is written to.
FREE = {"view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "slice", "select"}
FREE |= {"unsqueeze", "squeeze", "expand", "detach", "alias", "as_strided", "unbind", "split"}
FREE |= {"split_with_sizes", "empty", "empty_like", "new_empty", "empty_strided"}
FREE |= {"new_empty_strided", "is_same_size", "lift_fresh", "scalar_tensor", "promote_types"}
UNREAD = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}  # what they write to
TWO_LAUNCHES = {"nll_loss_backward", "slice_backward"}  # these fill with zeros first
# Operators whose result, or the size of it, the host has to know.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
WAITING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
# These begin with a `nonzero`, or a sum that is read, if a mask or counts are among the arguments.
BY_CONTENT = {"index", "index_put", "index_put_", "_index_put_impl_", "repeat_interleave"}
READING = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # on a CPU no operator shows these
# On a CPU it reads its labels; on CUDA, with the number of classes given, it does not.
ONLY_ON_CPU = torch.nn.functional.one_hot
SYNC_WARNING = "called a synchronizing CUDA operation"  # PyTorch's words
COLLECTIVE = "c10d::"  # every collective calls one of these, DDP's own in C++ too


class Operators(TorchDispatchMode):
    """Counts the operators that Python and autograd call inside a `with` block.

    `launches`: operators other than views, one over a list of tensors counted once, and the fills
    that some make first. `bytes`: what they read and write, as if no cache kept anything. `waits`:
    those that would make the host wait if the tensors were on a GPU, by line of this project.
    Extensions that do not use PyTorch's dispatcher are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.bytes = 0, 0
        self.waits, self.unwatched = Counter[str](), False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in WAITING or (name in BY_CONTENT and _reads_content(name, args)):
            self.note_wait(name)
        out = func(*args, **(kwargs or {}))
        if name not in FREE:
            self.launches += 1 + (name in TWO_LAUNCHES)
            self.bytes += _moved(func._schema, args, kwargs or {}, out)
        return out

    def note_wait(self, name: str) -> None:
        """One more wait of the host."""
        if not self.unwatched:
            self.waits[f"{name} in {_line()}"] += 1


def operators(work: Work) -> Operators:
    """The counts of one call."""
    counts = Operators()
    with _Reading(counts), counts:
        work()
    return counts


def launches(work: Work) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    wait_for_gpu()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        wait_for_gpu()
    # Regions that the host named have a shadow on the device.
    return sum(
        event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        for event in profiler.events() or ()
    )


def host_syncs(work: Work, device: torch.device) -> Counter[str]:
    """How often a warm call makes the host wait for the device, by the line that does.

    On CUDA PyTorch itself reports it. On a CPU these are the operators that would wait if the
    tensors were on a GPU; a number that the optimizer keeps on the host there counts as well, so at
    worst it is too many.
    """
    if device.type != "cuda":
        return operators(work).waits
    wait_for_gpu()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    syncs = [w for w in caught if SYNC_WARNING in str(w.message)]
    return Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in syncs)


def collectives(work: Work) -> Counter[str]:
    """Collectives of one call on this rank, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    names = (event.name for event in profiler.events() or ())
    return Counter(name.removeprefix(COLLECTIVE) for name in names if name.startswith(COLLECTIVE))


def extra_memory(work: Work) -> int:
    """Bytes of the GPU's memory that a call needs at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Reading(TorchFunctionMode):
    """Reports methods that give a tensor's values to Python."""

    def __init__(self, counts: Operators) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        counts, kwargs = self._counts, kwargs or {}
        if func in READING:
            counts.note_wait(func.__name__)
        counts.unwatched = func is ONLY_ON_CPU and (len(args) > 1 or "num_classes" in kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            counts.unwatched = False


def _reads_content(name: str, args: Any) -> bool:
    if name == "repeat_interleave":
        return True
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _moved(schema: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Arguments are read, those that the schema marks are written as well; so is what is new."""
    named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    unread = written if schema.name.split("::")[-1] in UNREAD else set()
    moved = [value for name, value in named.items() if name not in unread]
    moved += [value for name, value in named.items() if name in written]
    if not any(returned.alias_info for returned in schema.returns):
        moved.append(out)
    return sum(_size(leaf) for leaf in tree_leaves(moved) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """An expanded tensor is read from one place."""
    sizes = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n == 0)
    return math.prod(sizes) * tensor.element_size()


def _line() -> str:
    """The innermost line of this project, other than of this file, that led here."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    file, line = next(
        (file, line)
        for file, line in reversed(frames)
        if ROOT in file.parents and "site-packages" not in file.parts and file != Path(__file__)
    )
    return f"{file.relative_to(ROOT)}:{line}"
