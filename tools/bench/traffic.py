"""What a piece of work asks of a device: operator calls, bytes in memory, launches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They look at memory in another way, or take some without writing to it.
FREE = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze"}
FREE |= {
    "expand",
    "detach",
    "alias",
    "as_strided",
    "permute",
    "unbind",
    "split",
    "split_with_sizes",
}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FREE |= {"split_with_sizes", "_reshape_alias"}
UNREAD = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}  # what they write to


class Traffic(NamedTuple):
    """Of one piece of work."""

    calls: int
    bytes: int


def traffic(work: Callable[[], Any]) -> Traffic:
    """Operators that Python and autograd call, and the bytes that these read and write.

    An operator over a list of tensors is one call, however many launches it needs, and every tensor
    of each call counts as if no cache kept it. Extensions that do not go through PyTorch's
    dispatcher are not seen.
    """
    with _Counter() as counter:
        work()
    return Traffic(counter.calls, counter.bytes)


def launches(work: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(_is_launch(event) for event in profiler.events() or ())


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[-1] not in FREE:
            self.calls += 1
            self.bytes += _moved(func._schema, args, kwargs or {}, out)
        return out


def _moved(schema: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Arguments are read, those that the schema marks are written as well; so is what is new."""
    named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    unread = written if schema.name.split("::")[-1] in UNREAD else set()
    total = sum(_bytes(value) for name, value in named.items() if name not in unread)
    total += sum(_bytes(value) for name, value in named.items() if name in written)
    new = not any(returned.alias_info for returned in schema.returns)
    return total + (_bytes(out) if new else 0)


def _bytes(value: Any) -> int:
    return sum(_size(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """What is expanded is read from one place."""
    sizes = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n == 0)
    return math.prod(sizes) * tensor.element_size()


def _is_launch(event: Any) -> bool:
    """Seen on the device, other than as the shadow of a region that the host named."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
