"""Optimizer, decay groups, gradient clipping and skipping of non-finite steps.

Nothing here synchronizes with the device. Whether the gradient is finite is a tensor there;
PyTorch's fused optimizers read it and the clipping factor in their one pass over the weights.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.config import LearnerConfig
from mpl_fast.learner import apex


class ClippedOptimizer:
    """SGD or AdamW over the trained parameters of a network, with clipping.

    A step whose gradient has an infinity or a NaN is skipped: weights, momentum and step counters
    stay as they were.
    """

    def __init__(
        self, network: nn.Module, config: LearnerConfig, *, lr_tensor: bool = False
    ) -> None:
        """`lr_tensor`: keep the learning rate in a tensor, which a CUDA graph of the step reads."""
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self._apex = config.optimizer_backend == "apex"
        self.optimizer = _build(_groups(network, config), config, lr_tensor=lr_tensor)
        self._max_grad_norm = config.max_grad_norm
        groups = self.optimizer.param_groups
        self._lr_tensors = [self._new_lr_tensor() for _ in groups] if lr_tensor else []
        self.lr = config.lr
        _zero_momentum(self.optimizer)

    @property
    def lr(self) -> float:
        """The learning rate of all parameter groups."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        # A graph of the step reads float32 on a GPU: rounded without a graph too, both are equal.
        self._lr = _float32(value) if self.parameters[0].is_cuda else value
        for tensor in self._lr_tensors:
            tensor.fill_(self._lr)
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self._lr_tensors[number] if self._lr_tensors else self._lr

    @property
    def device_lr(self) -> Tensor | float:
        """The learning rate as a CUDA graph can read it: 0-dim on the device if in a tensor."""
        return self._lr_tensors[0].to(self.parameters[0].dtype) if self._lr_tensors else self._lr

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, update: bool = True) -> tuple[Tensor, Tensor]:
        """One step with `gradients`, the ``.grad`` of the parameters that have one.

        Returns 0-dim tensors on the device: the factor by which clipping multiplies the gradient,
        and whether it is finite. Without `update` nothing else happens.
        """
        norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
        finite = norm.isfinite()
        clipping = torch.ones_like(norm)
        if self._max_grad_norm:  # as in torch.nn.utils.clip_grad_norm_
            clipping = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if update:
            self._update(gradients, clipping, finite)
        return clipping, finite

    def _update(self, gradients: Sequence[Tensor], clipping: Tensor, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if self._apex:
            if self._max_grad_norm:
                torch._foreach_mul_(list(gradients), clipping)
            # Its kernels do nothing where this is not 0; `step` has no argument for it.
            optimizer._dummy_overflow_buf.copy_(~finite)
            optimizer.step()
            return
        optimizer.grad_scale = None
        if self._max_grad_norm and clipping.dtype == torch.float32:
            optimizer.grad_scale = 1.0 / clipping  # the fused step divides by it
        elif self._max_grad_norm:  # grad_scale can be float32 only
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
        """Restores momentum, step counters and learning rate; options stay those of this run."""
        groups = [
            {**saved, **{key: value for key, value in present.items() if key != "params"}}
            for saved, present in zip(
                state["param_groups"], self.optimizer.param_groups, strict=True
            )
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        _zero_momentum(self.optimizer)
        self.lr = float(state["param_groups"][0]["lr"])

    def _new_lr_tensor(self) -> Tensor:
        device = self.parameters[0].device
        # Fused kernels read float32 on a GPU, any type on a CPU.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        return torch.zeros((), dtype=dtype, device=device)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _build(
    groups: list[dict[str, Any]], config: LearnerConfig, *, lr_tensor: bool
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, config.lr, betas=betas, fused=True, capturable=lr_tensor)
    if config.optimizer_backend == "apex":
        return apex.fused_sgd(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )


def _zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Allocates momentum buffers of zeros.

    PyTorch allocates them uninitialized at the first step; if that step is skipped because its
    gradient is not finite, the second one would take their content for momentum.
    """
    for group in optimizer.param_groups:
        if "nesterov" in group and group["momentum"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _groups(network: nn.Module, config: LearnerConfig) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay: norms and biases, the parameters of at most
    one dimension, have none."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return "bn" not in name if config.conventions == "kekmodel" else parameter.ndim > 1

    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    with_decay = [p for n, p in named if decays(n, p)]
    without = [p for n, p in named if not decays(n, p)]
    groups = [(with_decay, config.weight_decay), (without, 0.0)]
    return [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]
