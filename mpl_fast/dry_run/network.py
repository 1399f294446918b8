"""Cost of one network per image: operations, saved activations, and time."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mpl_fast.models import count_parameters

ROWS = (2, 4)  # batch sizes; their difference separates costs per image from costs per pass
SECONDS = 2.0  # of timing
aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default}


@dataclass(frozen=True)
class NetworkCost:
    """Cost of one network in training; a multiply-add is two FLOPs."""

    parameters: int
    """Trained values."""
    trained_bytes: int
    bytes: int
    """All weights and statistics."""
    forward: int
    """FLOPs of an image's forward pass."""
    backward: int
    """FLOPs of an image's backward pass."""
    saved: float
    """Bytes that an image's forward pass keeps for the backward pass."""
    saved_once: float
    """Bytes that a pass keeps for any number of rows, such as weights in bfloat16."""
    largest: float
    """Bytes of an image's largest activation."""


def measure(
    network: nn.Module, side: int, *, device: torch.device, bf16: bool, compiled: bool = False
) -> NetworkCost:
    """Runs a network on a few images of `side` pixels, without computing its products.

    With `compiled`, saved activations are those after PyTorch's partition of the graph, which
    recomputes some of them; this takes seconds. The network is then compiled, and has gradients.
    """
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    few, many = (random_images(rows, side, device, bf16) for rows in ROWS)
    forward, backward = _flops(network, few, bf16)
    if compiled:
        network.compile(backend="aot_eager_decomp_partition", dynamic=False)
    # What is compiled is called below the dispatch modes.
    with nullcontext() if compiled else UncomputedProducts():
        less, more = (_saved(network, images, bf16) for images in (few, many))
    each = (sum(more) - sum(less)) / (ROWS[1] - ROWS[0])
    return NetworkCost(
        parameters=count_parameters(network),
        trained_bytes=sum(p.nbytes for p in network.parameters() if p.requires_grad),
        bytes=sum(t.nbytes for t in (*network.parameters(), *network.buffers())),
        forward=forward // ROWS[0],
        backward=backward // ROWS[0],
        saved=each,
        saved_once=max(0.0, sum(less) - ROWS[0] * each),
        largest=max((n for n in more if n not in less), default=0) / ROWS[1],
    )


def seconds_per_image(
    network: nn.Module, side: int, rows: int, *, device: torch.device, bf16: bool
) -> float:
    """Minimum wall time per image of forward and backward passes over `rows` images."""
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = random_images(rows, side, device, bf16)

    def seconds() -> float:
        network.zero_grad(set_to_none=True)
        began = _now(device)
        logits_of(network, images, bf16).float().sum().backward()
        return _now(device) - began

    seconds()  # the first one is slower
    found = [seconds()]
    while sum(found) < SECONDS and len(found) < 50:
        found.append(seconds())
    return min(found) / rows


def _now(device: torch.device) -> float:
    """When the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_images(rows: int, side: int, device: torch.device, bf16: bool) -> Tensor:
    dtype = torch.bfloat16 if bf16 else torch.float32
    images = torch.randn(rows, 3, side, side, device=device, dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last)


def logits_of(network: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits: Tensor = network(images)
    return logits


def without_products(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The results of an operator; those of a convolution, its backward pass or a matrix product
    have the right shapes, strides and dtypes, but no values. Costs do not depend on values, and on
    a CPU products take nearly all of the time, above all in bfloat16."""
    if func in PRODUCTS:
        meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args)
        images, last = args[0], torch.channels_last
        in_order = images.dim() == 4 and images.is_contiguous(memory_format=last)
        return torch.empty(
            func(*meta, **kwargs).shape,
            dtype=images.dtype,
            device=images.device,
            memory_format=last if in_order else torch.contiguous_format,
        )
    if func is aten.convolution_backward.default:
        gradient, images, weight, mask = *args[:3], args[10]
        return (
            torch.empty_like(images) if mask[0] else None,
            torch.empty_like(weight) if mask[1] else None,
            gradient.new_empty(gradient.shape[1]) if mask[2] else None,
        )
    return func(*args, **kwargs)


class UncomputedProducts(TorchDispatchMode):
    """Calls every operator by `without_products`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return without_products(func, args, kwargs or {})


def _flops(network: nn.Module, images: Tensor, bf16: bool) -> tuple[int, int]:
    """FLOPs of a forward and of a backward pass over all images."""
    formulas = {aten.convolution_backward: convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with UncomputedProducts():
        with counter:
            loss = logits_of(network, images, bf16).float().sum()
        forward = counter.get_total_flops()
        with counter:
            loss.backward()
    return forward, counter.get_total_flops()


def convolution_backward_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_others: object,
) -> int:
    """As many for the gradient of the images as for that of the weights. PyTorch's own formula
    takes the latter for that of a convolution in one group: a depthwise one has far fewer."""
    forward = 2 * math.prod(x_shape if transposed else grad_shape) * math.prod(w_shape[1:])
    return forward * (output_mask[0] + output_mask[1])


def _saved(network: nn.Module, images: Tensor, bf16: bool) -> list[int]:
    """Bytes of each storage that a pass saves, except weights and images."""
    kept = (*network.parameters(), *network.buffers(), images)
    known = {t.untyped_storage().data_ptr() for t in kept}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = logits_of(network, images, bf16).float().sum()
    pieces = list(found.values())
    del loss  # not earlier: a freed storage's address may be used again
    return pieces
