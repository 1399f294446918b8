"""Batch norm in forward-mode differentiation, fused with a ReLU that takes its output.

PyTorch differentiates a batch norm by some 20 operations on whole activations. Here each call of
`F.batch_norm`, whichever module makes it, has the rule of `losses.backend`: two passes, the second
of which includes a ReLU. A norm over all ranks (`models/sync_norm.py`) has a rule of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mpl_fast import losses
from mpl_fast.kernels.outputs import Dual

IDENTITY = 1.0  # the slope of a leaky ReLU that changes nothing


class FusedNorms(TorchFunctionMode):
    """Inside, batch norms of dual tensors have our rule. They have no backward pass then."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Normalized(Tensor):
    """The output of a batch norm, which the operation that takes it computes: a ReLU together with
    its own, any other one alone. It has no memory."""

    _compute: Callable[[float], Tensor]
    _value: Tensor | None

    @classmethod
    def like(cls, x: Tensor, compute: Callable[[float], Tensor]) -> Tensor:
        """Of the shape and type of x; `compute` takes the slope of a leaky ReLU below 0."""
        new: _Normalized = cls._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        new._compute, new._value = compute, None
        return new

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not torch._C._is_fwd_grad_enabled():  # in there this has no derivative
            raise NotImplementedError("a function of autograd's takes the output of a batch norm")
        kwargs = kwargs or {}
        if func is F.relu:
            return _relu(*args, **kwargs)
        if func is F.leaky_relu:
            return _leaky_relu(*args, **kwargs)
        args, kwargs = tree_map_only(cls, cls._computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} was called with the output of a batch norm, not computed yet")

    def _computed(self) -> Tensor:
        if self._value is None:
            self._value = self._compute(IDENTITY)
        return self._value


def _relu(input: _Normalized, inplace: bool = False) -> Tensor:
    return _leaky_relu(input, 0.0, inplace)


def _leaky_relu(input: _Normalized, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if input._value is not None:  # was taken before
        return F.leaky_relu(input._value, negative_slope, inplace)
    value = input._compute(negative_slope)
    if inplace:
        input._value = value
    return value


def _dual(x: Tensor | None, like: Tensor, value: float = 0.0) -> Dual:
    """Primal and tangent; an absent tensor is `value` for each channel of `like`."""
    if x is None:
        x = like.new_full((like.shape[1],), value)
    primal, tangent = forward_ad.unpack_dual(x)
    return Dual(primal, torch.zeros_like(primal) if tangent is None else tangent)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`. Of constants, and where it would update running statistics, PyTorch's own."""
    given = None
    if running_mean is not None and running_var is not None:
        given = running_mean, running_var
    tensors = [x for x in (input, weight, bias) if x is not None]
    constant = all(forward_ad.unpack_dual(x).tangent is None for x in tensors)
    if constant or training == (given is not None):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = _dual(input, input)
    scale, shift = _dual(weight, x.primal, 1.0), _dual(bias, x.primal)

    def compute(slope: float) -> Tensor:
        rule = losses.backend(x.primal).batch_norm_jvp
        y, dy = rule(x, scale, shift, given, eps, slope)
        dual: Tensor = forward_ad.make_dual(y, dy)
        return dual

    return _Normalized.like(x.primal, compute)
