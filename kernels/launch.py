"""Launches of the kernels: block sizes, scalars on the device, torch.library, autograd.

An op is one function that allocates outputs and launches a kernel. PyTorch's compiler calls it
through torch.library: as `triton_op`, whose kernel inductor launches itself, where Triton compiles,
and as an opaque `custom_op` on Triton's interpreter, whose kernels cannot be traced. Eager calls
skip torch.library: its dispatcher costs more than the launch.

Signatures of ops use Tensor, list[Tensor], int, float and bool alone, which every version of
PyTorch accepts: an absent tensor is an empty list.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from triton.runtime import JITFunction

from mpl_fast.kernels.outputs import Scalar
from mpl_fast.kernels.rows import load_block

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Decided by the environment variable TRITON_INTERPRET when a kernel is decorated.
INTERPRETED = not isinstance(load_block, JITFunction)


class Launch(NamedTuple):
    """Columns of a block, and warps of a program, which computes one row."""

    block: int
    warps: int


def launch_config(classes: int) -> Launch:
    """Few warps for each row: more of them wait for one another instead of for memory.

    Chosen by instruction counts of the compiled code for sm_90 against its memory time, not by
    timing. Up to 8192 columns a row is one block and stays in registers, without a spill.
    """
    block = max(16, 1 << (classes - 1).bit_length())
    return Launch(2048, 4) if block > 8192 else Launch(block, max(1, block // 1024))


def dense_rows(x: Tensor) -> Tensor:
    """x, copied only if neighbors in a row are not next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(value: Scalar, like: Tensor) -> Tensor:
    """A 0-dim float32 on the device of `like`: filled there, since a copy would synchronize.

    A tensor is there already, or `checks.scalar` has refused it.
    """
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32)
    if torch.compiler.is_compiling():
        # A product may take an input of the graph; a filled number would be compiled into it.
        return torch.ones((), dtype=torch.float32, device=like.device) * value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def wrap_triton(kernel: Any, programs: int, x: Tensor, *others: Tensor) -> Callable[..., None]:
    """Launches `kernel` on a grid of `programs`; launches nothing if there are none.

    x, others: (rows, C), with dense rows; they are the kernel's first arguments, each with the
    stride between its rows. The constants C, BLOCK and ALIGN are passed, too; ALIGN is a divisor of
    all strides, up to 16 elements, the most that a kernel makes use of.

    Named as PyTorch's function, since its compiler searches an op's source for calls of that name:
    the kernels that it finds become part of the key of its caches. So each op calls this itself.
    """
    is_traced = isinstance(x, (FakeTensor, FunctionalTensor))
    if programs == 0 or (is_traced and INTERPRETED):
        return lambda *_, **__: None
    classes = x.shape[1]
    block, warps = launch_config(classes)
    rows = [argument for tensor in (x, *others) for argument in (tensor, tensor.stride(0))]
    alignment = math.gcd(16, *map(int, rows[1::2]))  # int(): may be symbolic
    options = {"C": classes, "BLOCK": block, "ALIGN": alignment, "num_warps": warps}
    if is_traced:
        return partial(torch.library.wrap_triton(kernel)[(programs,)], *rows, **options)

    return partial(launch(kernel, (programs,), x), *rows, **options)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor) -> Callable[..., None]:
    """Launches `kernel` eagerly on the device of `like`."""

    def call(*args: Any, **options: Any) -> None:
        # Triton launches on the current device, not on the tensors'.
        with torch.cuda.device_of(like):
            # Fusion is explicit, since Triton 3.9 warns that its default will change. Inductor
            # decides that by itself and takes no such argument.
            kernel[grid](*args, **options, enable_fp_fusion=True)

    return call


def register(name: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes `function` the op `name` ("mpl_fast::x"); call what this returns.

    An op has no gradient, writes to none of its arguments and returns none of them.
    """
    op: Any
    if INTERPRETED:
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(function)  # allocates outputs and launches nothing
    else:
        op = torch.library.triton_op(name, function, mutates_args=())

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return cast(Result, op(*args, **kwargs))
        return function(*args, **kwargs)

    return call


def differentiable(
    loss: Callable[..., tuple[Tensor, Tensor]], gradient: Callable[..., Tensor]
) -> Callable[[Tensor, list[Tensor], tuple[float, ...]], tuple[Tensor, ...]]:
    """A function of logits (rows, C), constant tensors and numbers, differentiable by the logits.

    loss(x, constants, *numbers) returns shares (k, rows), whose sums over rows are the loss and
    k - 1 statistics, and what the gradient needs besides. gradient(x, constants, *numbers, saved,
    upstream) returns the gradient (rows, C); upstream is the one with respect to the loss.
    """

    class Loss(torch.autograd.Function):
        # No more names: where one argument less than given has a name, as *constants would be, the
        # compiler of PyTorch 2.11 takes ctx for one too many.
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            numbers, x, *constants = arguments
            part, saved = loss(x, constants, *numbers)
            if not torch.compiler.is_compiling():  # it cannot trace this
                ctx.set_materialize_grads(False)  # a zero for a statistic would be a launch
            outputs = part.sum(1).unbind()
            ctx.save_for_backward(saved, x, *constants)
            ctx.numbers = numbers
            ctx.mark_non_differentiable(*outputs[1:])
            return outputs

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            _refuse_second_derivative()
            saved, x, *constants = ctx.saved_tensors
            found = None
            if upstream is not None:
                found = gradient(x, constants, *ctx.numbers, saved, upstream)
            return None, found, *(None for _ in constants)

    def call(x: Tensor, constants: list[Tensor], numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
        result, *statistics = cast(tuple[Tensor, ...], Loss.apply(numbers, x, *constants))
        if torch.compiler.is_compiling():
            # The compiler of PyTorch 2.11 loses the mark of outputs that are not differentiable,
            # and fails where it needs their gradient.
            statistics = [value.detach() for value in statistics]
        return result, *statistics

    return call


def _refuse_second_derivative() -> None:
    """In a backward pass: its result would be taken for a constant.

    While compiling, gradients are always enabled, and PyTorch itself refuses a second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused losses have no second derivative (create_graph=True); "
            "set MPL_FAST_LOSSES=reference to compute them with plain PyTorch"
        )
