"""How a fused loss reaches its kernel: block sizes, scalars on the device, torch.library.

An op is one function that allocates outputs and launches a kernel. PyTorch's compiler sees it
through torch.library: as `triton_op`, whose kernel inductor launches itself, where Triton compiles,
and as an opaque `custom_op` on Triton's interpreter, whose kernels cannot be traced. Eager calls
skip torch.library: its dispatcher costs more than the launch.

Signatures of ops use Tensor, list[Tensor], int, float and bool alone, which every version reads
alike: an absent tensor is an empty list, or any other tensor together with a flag.
"""

import math
from collections.abc import Callable, Sequence
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
    """How a row of a given width is cut into blocks."""

    block: int  # columns
    single: bool  # the whole row is one block, kept in registers
    warps: int


def launch_config(width: int) -> Launch:
    """Few warps for each row: more of them wait for one another instead of for memory.

    Chosen by instruction counts of the compiled code for sm_90 against its memory time, not by
    timing; up to 8192 columns no configuration here spills registers.
    """
    block = max(16, 1 << (width - 1).bit_length())
    if block > 8192:
        return Launch(2048, False, 4)
    return Launch(block, True, max(1, block // 1024))


def align(*strides: int) -> int:
    """The largest divisor of all strides that a kernel makes use of, up to 16 elements."""
    return math.gcd(16, *(int(stride) for stride in strides))  # int(): may be symbolic


def on_device(value: Scalar, like: Tensor) -> Tensor:
    """A 0-dim float32 on the device of `like`: filled there, since a copy would synchronize.

    A tensor lies there already, or `checks.scalar` has refused it.
    """
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32)
    if torch.compiler.is_compiling():
        # A product may take an input of the graph; a filled number would be compiled into it.
        return torch.ones((), dtype=torch.float32, device=like.device) * value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def wrap_triton(kernel: Any, x: Tensor, programs: int, warps: int) -> Callable[..., None]:
    """Launches `kernel` on a grid of `programs`; x, one of its tensors, tells if this is a trace.

    Named as PyTorch's function, since its compiler searches an op's source for calls of that name:
    the kernels that it finds become part of the key of its caches.
    """
    if isinstance(x, (FakeTensor, FunctionalTensor)):
        return partial(torch.library.wrap_triton(kernel)[(programs,)], num_warps=warps)
    # Fusion is said aloud, since Triton 3.9 warns that its default will change. Inductor decides
    # that by itself and takes no such argument.
    return partial(kernel[(programs,)], num_warps=warps, enable_fp_fusion=True)


def register(
    name: str, function: Callable[Arguments, Result], fake: Callable[..., Result]
) -> Callable[Arguments, Result]:
    """Makes `function` the op `name` ("mpl_fast::x"); call what this returns.

    fake: the same outputs from shapes alone; no gradient passes through an op, nor does it write to
    its arguments or return one of them.
    """
    op: Any
    if INTERPRETED:
        op = torch.library.custom_op(name, function, mutates_args=())
        op.register_fake(fake)
    else:
        op = torch.library.triton_op(name, function, mutates_args=())

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return cast(Result, op(*args, **kwargs))
        return function(*args, **kwargs)

    return call


def constants(marked: Sequence[Tensor]) -> list[Tensor]:
    """Outputs that an autograd.Function marked as not differentiable.

    The compiler of PyTorch 2.11 forgets that they are, and fails where it asks for their gradient.
    """
    return [x.detach() for x in marked] if torch.compiler.is_compiling() else [*marked]


def no_second_derivative() -> None:
    """First line of a backward pass: refuses to be differentiated, where it would be wrong.

    While compiling, gradients are always enabled, and PyTorch itself refuses a second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused losses have no second derivative (create_graph=True); "
            "set MPL_FAST_LOSSES=reference to compute them with plain PyTorch"
        )
