"""How a gradient moves weights: the optimizer, what it decays, clipping, and what is left undone.

Nothing here waits for the device. Whether a gradient is finite is a tensor there, and PyTorch's
fused optimizers read it, with the clipping, in the one pass that they make over the weights.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.config import LearnerConfig
from mpl_fast.learner import apex


class ClippedOptimizer:
    """SGD or AdamW over the trained parameters of a network.

    A step whose gradient has an infinity or a NaN is left out whole: weights, momentum and step
    counters stay as they were.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig, *, fixed: bool = False) -> None:
        """`fixed`: the learning rate is a tensor at a fixed address, as a CUDA graph wants it."""
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self._apex = config.optimizer_backend == "apex"
        self.optimizer = _build(_groups(network, config), config, fixed=fixed)
        self._clip = config.max_grad_norm
        groups = self.optimizer.param_groups
        self._rates = [self._fixed_rate() for _ in groups] if fixed else []
        self.lr = config.lr
        _begin_momentum(self.optimizer)

    @property
    def lr(self) -> float:
        """Of all groups."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        # A graph of the step reads float32 numbers on a GPU; without one it is to move alike.
        self._lr = _float32(value) if self.parameters[0].is_cuda else value
        for rate in self._rates:
            rate.fill_(self._lr)
        groups = self.optimizer.param_groups
        for number, group in enumerate(groups):
            group["lr"] = self._rates[number] if self._rates else self._lr

    @property
    def rate(self) -> Tensor | float:
        """The same, as what a CUDA graph may read."""
        return self._rates[0].to(self.parameters[0].dtype) if self._rates else self._lr

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, moves: bool = True) -> tuple[Tensor, Tensor]:
        """Goes down `gradients`, those of the parameters that have one.

        Returns 0-dim tensors on the device: by what clipping multiplied the gradient, and whether
        it was finite. Unless it `moves`, that is all that happens.
        """
        norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
        finite = norm.isfinite()
        clipping = torch.ones_like(norm)
        if self._clip:
            clipping = (self._clip / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
        if moves:
            self._move(gradients, clipping, finite)
        return clipping, finite

    def _move(self, gradients: Sequence[Tensor], clipping: Tensor, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if self._apex:
            if self._clip:
                torch._foreach_mul_(list(gradients), clipping)
            # Its kernels return at once where this is not 0; no argument of `step` is for it.
            optimizer._dummy_overflow_buf.copy_(~finite)
            optimizer.step()
            return
        optimizer.grad_scale = None
        if self._clip and clipping.dtype == torch.float32:
            optimizer.grad_scale = 1.0 / clipping  # which the fused step divides by
        elif self._clip:  # it knows scales of float32 only
            torch._foreach_mul_(list(gradients), clipping)
        optimizer.found_inf = (~finite).to(torch.float32)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Momentum and step counters."""
        state: dict[str, Any] = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = self.lr
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave: momentum, counters and rate, but no option."""
        groups = [
            {**saved, **{key: value for key, value in own.items() if key != "params"}}
            for saved, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        _begin_momentum(self.optimizer)
        self.lr = float(state["param_groups"][0]["lr"])

    def _fixed_rate(self) -> Tensor:
        device = self.parameters[0].device
        # The fused kernels read float32 on a GPU; on a CPU any.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        return torch.zeros((), dtype=dtype, device=device)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _build(
    groups: list[dict[str, Any]], config: LearnerConfig, *, fixed: bool
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, config.lr, betas=betas, fused=True, capturable=fixed)
    if config.optimizer_backend == "apex":
        return apex.fused_sgd(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros, where PyTorch would make room at the first step: if that step is then left out for a
    gradient that is not finite, whatever lies in that memory is taken for momentum."""
    for group in optimizer.param_groups:
        if "nesterov" in group and group["momentum"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _groups(network: nn.Module, config: LearnerConfig) -> list[dict[str, Any]]:
    """Norms and biases, the parameters of at most one dimension, are not decayed."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return "bn" not in name if config.conventions == "kekmodel" else parameter.ndim > 1

    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if decays(n, p)]
    others = [p for n, p in named if not decays(n, p)]
    groups = [(decayed, config.weight_decay), (others, 0.0)]
    return [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]
