"""Batch norm over the images of all ranks, without a wait of the host.

PyTorch's SyncBatchNorm gathers how many values each rank has and selects by these counts, for which
the host waits in every layer. Here all ranks have equally many values, as in a step of training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpl_fast.distributed import all_gather, mean_over_ranks, world_size


def synchronized(network: nn.Module) -> nn.Module:
    """The network with a `SyncNorm` in place of every batch norm."""
    for name, module in [*network.named_modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            network.set_submodule(name, SyncNorm(module))
    return network


class SyncNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks in training mode; in evaluation mode each rank is by itself.

    Has the parameters and buffers of the norm that it replaces, under their names. Submodules of
    the norm, such as timm's activation, are applied after it. A training pass exchanges ``(2, C)``
    numbers forward, and ``(2, C)`` backward or for a forward-mode derivative: all ranks must take
    the same passes.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        for name, module in norm.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self._over_ranks(x) if self.training else self._alone(x)
        for module in self.children():
            x = module(x)
        return x

    def _alone(self, x: Tensor) -> Tensor:
        """By the running statistics, or by those of the batch where there are none."""
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None, eps=self.eps)

    def _over_ranks(self, x: Tensor) -> Tensor:
        mean, var = _statistics(x.detach())
        self._update(mean, var, count=x.numel() // x.shape[1] * world_size())
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        function: Any = _Normalize if torch.compiler.is_compiling() else _NormalizeWithForwardRule
        normalized: Tensor = function.apply(x, weight, bias, mean, var, self.eps)
        return normalized

    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Updates the running statistics, with the unbiased variance of the `count` values."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks: (C,) each, at least float32.

    Variances about each rank's own mean, so that none is a small difference of large numbers.
    """
    if torch.compiler.is_compiling():  # then the float32 copy is not written to memory
        var, mean = torch.var_mean(_at_least_float32(x), [0, *range(2, x.ndim)], correction=0)
    else:  # in float32 on CUDA, in the type of x on a CPU
        x = x if x.is_cuda else _at_least_float32(x)
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    means, variances = all_gather(torch.stack((mean, var))).unbind(1)  # (ranks, C) each
    of_means, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + of_means


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, where mean and var are functions of x: its
    statistics over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_derivative(ctx, gradients[0]), None, None, None


class _NormalizeWithForwardRule(_Normalize):
    """The same with a rule for forward-mode differentiation, which the compiler does not take."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_forward(x, weight, mean, var)
        return _Normalize.forward(ctx, x, weight, bias, mean, var, eps)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor) -> Tensor:
        x, _, mean, var = ctx.saved_tensors
        # The derivative by x is a symmetric matrix: it maps changes as it maps gradients.
        by_x, _, _ = _derivative(ctx, changes[0])
        by_x += F.batch_norm(x, mean, var, changes[1], changes[2], eps=ctx.eps)
        return by_x


def _derivative(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, over all ranks, and by weight and bias, of this rank alone, for the
    gradient `v` by the result.

    PyTorch's operator subtracts from v its mean, and the part along the normalized x, over this
    rank alone. What is in excess of those over all ranks is added again: a batch norm of x, too.
    """
    x, weight, mean, var = ctx.saved_tensors
    deviation = (var + ctx.eps).rsqrt()
    of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        v, x, weight, None, None, mean, deviation, True, ctx.eps, [True, True, True]
    )
    sums = torch.stack((of_weight, of_bias))  # (2, C)
    excess = (sums - mean_over_ranks(sums)) / (x.numel() // x.shape[1])
    scale, shift = (excess * (weight * deviation)).unbind()
    return of_x.add_(F.batch_norm(x, mean, var, scale, shift, eps=ctx.eps)), of_weight, of_bias


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
