"""Counts how often a step makes the host wait for the device, without a device too."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
# Operators whose result, or the size of it, the host has to know.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
WAITING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
# On a CPU these read memory and no operator tells of it.
READING = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
# With a mask, or counts, among the arguments: these begin with a `nonzero`, or a sum to be read.
BY_CONTENT = {"index", "index_put", "index_put_", "_index_put_impl_", "repeat_interleave"}
WORDS = "called a synchronizing CUDA operation"  # PyTorch's
# On a CPU it looks at its labels; on CUDA, told how many classes there are, it does not.
ONLY_ON_CPU = torch.nn.functional.one_hot


def waits(step: Callable[[], Any], device: torch.device) -> Counter[str]:
    """What a warm step waits for, by the line of this project that asks for it.

    On CUDA PyTorch itself tells. On a CPU it is what would wait if the tensors were on a GPU: a
    number that the optimizer keeps on the host there counts as well, so at worst it is too many.
    """
    return _on_gpu(step) if device.type == "cuda" else _on_cpu(step)


def _on_gpu(step: Callable[[], Any]) -> Counter[str]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    told = [w for w in caught if WORDS in str(w.message)]
    return Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in told)


def _on_cpu(step: Callable[[], Any]) -> Counter[str]:
    waiting = _Waiting()
    with _Reading(waiting), waiting:
        step()
    return waiting.found


class _Waiting(TorchDispatchMode):
    """Counts operators that would wait; the backward pass runs through here as well."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.deaf = Counter[str](), False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in WAITING or (name in BY_CONTENT and _by_content(name, args)):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """One more wait."""
        if not self.deaf:
            self.found[f"{name} in {_line()}"] += 1


class _Reading(TorchFunctionMode):
    """Counts methods that hand a tensor's values to Python."""

    def __init__(self, waiting: _Waiting) -> None:
        super().__init__()
        self._waiting = waiting

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READING:
            self._waiting.note(func.__name__)
        before, self._waiting.deaf = self._waiting.deaf, _by_design(func, args, kwargs)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._waiting.deaf = before


def _by_design(func: Any, args: Any, kwargs: dict[str, Any] | None) -> bool:
    return func is ONLY_ON_CPU and (len(args) > 1 or "num_classes" in (kwargs or {}))


def _by_content(name: str, args: Any) -> bool:
    if name == "repeat_interleave":
        return True
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _line() -> str:
    """The innermost line of this project, other than of this file, that led here."""
    frames = traceback.extract_stack()
    ours = (f for f in reversed(frames) if _is_ours(Path(f.filename)))
    here = next(ours)
    return f"{Path(here.filename).relative_to(ROOT)}:{here.lineno}"


def _is_ours(file: Path) -> bool:
    return ROOT in file.parents and "site-packages" not in file.parts and file != Path(__file__)
