"""The kernels of a network's passes: FLOPs, and bytes that they read and write.

Two passes over few images are recorded, whose difference separates what grows with the number of
images from what does not, such as weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from mpl_fast.dry_run.network import (
    ROWS,
    convolution_backward_flops,
    logits_of,
    random_images,
    without_products,
)

FLOPS = {
    **flop_registry,
    torch.ops.aten.convolution_backward: shape_wrapper(convolution_backward_flops),
}

# Arguments that are read twice: a norm takes its statistics first, and a convolution's backward
# pass is two kernels, of which each reads the gradient of its output.
TWICE = {
    "native_batch_norm": (0,),
    "native_batch_norm_backward": (0, 1),
    "convolution_backward": (0,),
}
Value = tuple[int, int]
"""Address of a storage, and how many operators had written to it before."""


class Kernel(NamedTuple):
    """One kernel, or a few that follow each other."""

    flops: float
    """Of an image."""
    bytes: float
    """Read and written, of an image."""
    fixed: float
    """Bytes for any number of images."""
    launches: int


class Passes(NamedTuple):
    """The kernels of a forward and of a backward pass in training mode."""

    forward: list[Kernel]
    backward: list[Kernel]


class Call(NamedTuple):
    """One call of an operator."""

    product: bool
    """A matrix product or a convolution, which no compiler fuses with what is beside it."""
    flops: int
    reads: dict[Value, int]
    """Bytes."""
    twice: list[Value]
    writes: dict[Value, int]


Group = list[Call]
"""Calls that are one kernel."""


def trace(network: nn.Module, side: int, *, bf16: bool, compiled: bool) -> Passes:
    """Records passes of a network on the CPU. With `compiled`, operators between two products are
    one kernel, as Inductor's mostly are: what only they exchange does not go through memory."""
    network = network.to(memory_format=torch.channels_last).train()
    few, many = (_record(network, rows, side, bf16, compiled) for rows in ROWS)
    forward, backward = (
        [_of_an_image(a, b) for a, b in zip(*kernels, strict=True)]
        for kernels in zip(few, many, strict=True)
    )
    return Passes(forward, backward)


def _of_an_image(few: Kernel, many: Kernel) -> Kernel:
    """A kernel from what it does for all images of two batches."""
    each = (many.bytes - few.bytes) / (ROWS[1] - ROWS[0])
    fixed = max(0.0, few.bytes - ROWS[0] * each)
    return Kernel(few.flops / ROWS[0], each, fixed, few.launches)


def _record(
    network: nn.Module, rows: int, side: int, bf16: bool, compiled: bool
) -> list[list[Kernel]]:
    """Kernels of the forward and of the backward pass, for all rows."""
    images = random_images(rows, side, torch.device("cpu"), bf16)
    network.zero_grad(set_to_none=True)
    recorder = _Recorder()
    with recorder:
        logits = logits_of(network, images, bf16)
    forward, gradient = len(recorder.calls), torch.ones_like(logits)
    with recorder:
        logits.backward(gradient)
    passes = recorder.calls[:forward], recorder.calls[forward:]
    return kernels([_groups(calls) if compiled else [[c] for c in calls] for calls in passes])


def _groups(calls: Sequence[Call]) -> list[Group]:
    """Each product alone, and the calls between two products together."""
    found: list[Group] = []
    for call in calls:
        if call.product or not found or found[-1][-1].product:
            found.append([])
        found[-1].append(call)
    return found


def kernels(passes: Sequence[Sequence[Group]]) -> list[list[Kernel]]:
    """The kernels of groups of calls, for all images of the passes together."""
    inputs = {id(group): _inputs(group) for groups in passes for group in groups}
    read = set().union(*inputs.values())
    return [[_kernel(group, inputs[id(group)], read) for group in groups] for groups in passes]


def _inputs(group: Group) -> dict[Value, int]:
    """Bytes of what a group reads and has not written itself."""
    found: dict[Value, int] = {}
    written: set[Value] = set()
    for call in group:
        found |= {value: size for value, size in call.reads.items() if value not in written}
        written |= call.writes.keys()
    return found


def _kernel(group: Group, inputs: dict[Value, int], read_by_others: set[Value]) -> Kernel:
    """What a group reads, reads again and writes, except what only its own calls read."""
    origins = {value: {value} for value in inputs}  # the inputs from which a value is computed
    again = 0
    for call in group:
        again += sum(inputs[v] for v in set().union(*(origins[value] for value in call.twice)))
        of_call = set().union(*(origins[value] for value in call.reads))
        origins |= dict.fromkeys(call.writes, of_call)
    inner = {value for call in group for value in call.reads} - read_by_others
    written = sum(
        size for call in group for value, size in call.writes.items() if value not in inner
    )
    launches = 1 + sum(bool(call.twice) for call in group)
    return Kernel(
        flops=sum(call.flops for call in group),
        bytes=sum(inputs.values()) + again + written,
        fixed=0.0,
        launches=launches,
    )


class _Recorder(TorchDispatchMode):
    """Records the calls of operators that read or write memory; views do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._writes: dict[int, int] = {}  # to each address
        # Or the address of one could become another's. Not tensors: autograd copies a gradient
        # that somebody else refers to.
        self._kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        reads = {self._value(tensor): tensor.nbytes for tensor in given}
        operator, name = func.overloadpacket, func.overloadpacket.__name__
        twice = [self._value(args[number]) for number in TWICE.get(name, ())]
        out = without_products(func, args, kwargs)
        made = _tensors(out)
        if len(made) == 1:  # the gradient of a convolution's weights alone, without that of images
            twice = []
        self._kept += [tensor.untyped_storage() for tensor in made]
        if func._schema.is_mutable:
            for address in {tensor.untyped_storage().data_ptr() for tensor in made}:
                self._writes[address] = self._writes.get(address, 0) + 1
        writes = {self._value(tensor): tensor.nbytes for tensor in made}
        if given and any(writes.keys() - reads.keys()):  # not a view
            formula = FLOPS.get(operator)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.calls.append(Call(formula is not None, flops, reads, twice, writes))
        return out

    def _value(self, tensor: Tensor) -> Value:
        address = tensor.untyped_storage().data_ptr()
        return address, self._writes.get(address, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
