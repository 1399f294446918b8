"""A network together with everything that trains it.

How gradients cross ranks, mixed precision, compilation, clipping and the moving average are decided
here and nowhere else, so that an algorithm reads as if there were one device.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpl_fast import losses, optimizers
from mpl_fast.config import LearnerConfig
from mpl_fast.derivatives import EPSILON, Derivative, own_statistics
from mpl_fast.distributed import mean_over_ranks_, world_size
from mpl_fast.draws import DrawnAs
from mpl_fast.models.frozen import FrozenNorm


class Learner:
    """Runs forward passes, takes gradient steps and keeps an average of its weights.

    Replicas stay identical: DDP averages the gradients, `end` averages the batch-norm statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        config: LearnerConfig,
        *,
        steps: int,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        compiled: str = "off",
    ) -> None:
        self.config, self.steps = config, steps
        self.device, self.bf16 = torch.device(device), bf16
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = _frozen_copy(self.network) if config.ema else None
        _compile(self.network, compiled)
        self._replica = _replicate(self.network, self.device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = optimizers.build(self.network, config, self.device)
        self._derivative = Derivative(self.network)
        self._ended, self._resting = -1, False

    def __call__(self, *views: Tensor) -> Tensor:
        """Logits ``(N, C)`` of all views in one forward pass, so that they share batch-norm
        statistics.

        `views` are ``(n, 3, H, W)`` each; the rows come back in their order.
        """
        with self._autocast():
            logits: Tensor = self._replica(_joined(views))
        return logits

    @torch.no_grad()
    def preview(self, *views: Tensor) -> Tensor:
        """What calling this would give, dropout included, without gradient or any trace of it in
        the running statistics."""
        with own_statistics(self.network), self._autocast():
            logits: Tensor = self.network(_joined(views))
        return logits

    @torch.no_grad()
    def judge(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` without gradient or dropout, normalized by these images' own
        statistics.

        The running statistics are neither read nor touched. They lag behind the weights, so right
        after an update they make any network look worse than it is.
        """
        return self._judge(images)

    def labeled_gradient(
        self, images: Tensor, labels: Tensor, statistics: Literal["own", "running"] = "own"
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of the cross-entropy, a list like `parameters` averaged over ranks, and the
        loss of this rank.

        The logits are those of `judge`, or, with running statistics, those of `infer`.
        """
        run = statistics == "running"
        logits = self._evaluate(self.network, images) if run else self._judge(images)
        loss = losses.smoothed_ce(logits, labels).loss
        gradient = list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        mean_over_ranks_(gradient)
        return gradient, loss.detach()

    def weights(self) -> list[Tensor]:
        """A copy of the trained parameters."""
        return [p.detach().clone() for p in self.parameters]

    def along(
        self,
        weights: Sequence[Tensor],
        direction: Sequence[Tensor],
        images: Tensor,
        method: Literal["auto", "forward", "central"] = "auto",
        epsilon: float = EPSILON,
        *,
        training: bool = True,
    ) -> Tensor:
        """``(N, C)``: how fast the logits change at `weights` along `direction`.

        Those of a training pass, of which the running statistics show no trace and whose dropout
        draws from the generators as they are; or those of `infer`.
        """
        if method != "auto":
            self._derivative.method = method
        own = own_statistics(self.network) if training else nullcontext()
        drawn = DrawnAs(torch.bfloat16) if self.bf16 else nullcontext()
        self.network.train(training)
        try:
            with own, drawn:
                return self._derivative.along(weights, direction, images, epsilon)
        finally:
            self.network.train()

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of the weights, in evaluation mode."""
        return self._evaluate(self.network, images)

    @torch.no_grad()
    def infer_average(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of the averaged weights, or of the weights if no average is kept."""
        return self._evaluate(self.average or self.network, images)

    def _judge(self, images: Tensor) -> Tensor:
        with own_statistics(self.network):
            return self._evaluate(self.network, images)

    def _evaluate(self, network: nn.Module, images: Tensor) -> Tensor:
        was_training = network.training
        network.eval()
        try:
            with self._autocast():
                logits: Tensor = network(images)
        finally:
            network.train(was_training)
        return logits

    def descend(self, loss: Tensor) -> Tensor:
        """One clipped optimizer step down a scalar loss; the gradient is averaged over ranks.

        Returns, 0-dim on the device, how far SGD moved the weights for each unit of this gradient:
        lr (1 + momentum) under Nesterov, else lr, times the clipping. (What older gradients moved
        through the momentum is not this loss's doing.)
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clipping = self.parameters[0].new_ones(())
        if self.config.clip:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
            clipping = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)  # as that function does
        if not self._resting:
            self.optimizer.step()
        ahead = 1.0 + self.config.momentum if self.config.nesterov else 1.0
        rate: Tensor = clipping * (self.lr * ahead)
        return rate

    def rest(self) -> None:
        """Until the next `begin`, `descend` moves nothing, and gathers no momentum either."""
        self._resting = True
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    @property
    def lr(self) -> float:
        """The learning rate that `begin` has set."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin(self, step: int) -> None:
        """Sets the learning rate for a step: a function of its number, so there is nothing to
        resume."""
        self.network.train()
        self._resting = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(step, self.steps)

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Averages batch-norm statistics over ranks and moves the average towards the new weights.

        The decay warms up as ``min(ema, (1 + t) / (10 + t))``, as the official code has it.
        """
        mean_over_ranks_(_statistics(self.network))
        if self._ended == step:  # an algorithm had a reason to move the average earlier
            return
        self._ended = step
        if self.average is None:
            return
        kept, mine = _tensors(self.average), _tensors(self.network)
        decay = min(self.config.ema, (1 + step) / (10 + step))
        copied = list(zip(kept[1], mine[1], strict=True))  # counters
        if self.config.conventions == "kekmodel":
            decay = self.config.ema
            copied = list(zip(self.average.buffers(), self.network.buffers(), strict=True))
        torch._foreach_lerp_(kept[0], mine[0], 1.0 - decay)
        for k, m in copied:
            k.copy_(m)

    def finite(self) -> Tensor:
        """Whether every weight and statistic is a finite number: 0-d bool on the device."""
        norms = torch._foreach_norm(_tensors(self.network)[0])
        return torch.stack(list(norms)).sum().isfinite()

    def state_dict(self) -> dict[str, Any]:
        """All that a continued run needs of this learner."""
        average = self.average.state_dict() if self.average is not None else None
        optimizer = self.optimizer.state_dict()
        return {"network": self.network.state_dict(), "average": average, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _frozen_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


def _compile(network: nn.Module, mode: str) -> None:
    """Compiles in place, which keeps the parameters' names and serves `infer` too."""
    if mode == "off":
        return
    # Otherwise DDP's bucket boundaries would split the network into several graphs.
    torch._dynamo.config.optimize_ddp = False
    # A form for each mode and shape that a recipe calls it in; past the limit it runs uncompiled.
    torch._dynamo.config.recompile_limit = 32
    # Dropout as uncompiled code draws it, or exact feedback would follow another mask's student.
    torch._inductor.config.fallback_random = True
    # No CUDA graphs: a forward of the student between the teacher's forward and backward would
    # overwrite what the teacher's graph still needs.
    modes = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    network.compile(dynamic=False, mode=modes[mode])


def _replicate(network: nn.Module, device: torch.device) -> nn.Module:
    if world_size() == 1:
        return network
    # Batch-norm statistics are averaged in `end`; the option's name changed in torch 2.13.
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    modern = "forward_sync_buffers" in options
    sync = {"forward_sync_buffers" if modern else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    wrap: Any = DistributedDataParallel
    replica: nn.Module = wrap(network, device_ids=ids, gradient_as_bucket_view=True, **sync)
    return replica


def _joined(views: tuple[Tensor, ...]) -> Tensor:
    return views[0] if len(views) == 1 else torch.cat(views)


def _statistics(network: nn.Module) -> list[Tensor]:
    """What training passes move: floating-point buffers, but not those of frozen norms."""
    moving = (m for m in network.modules() if not isinstance(m, FrozenNorm))
    return [b for m in moving for b in m.buffers(recurse=False) if b.is_floating_point()]


def _tensors(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point weights and statistics, and integer counters."""
    everything: list[Tensor] = [*network.parameters(), *network.buffers()]
    return (
        [t for t in everything if t.is_floating_point()],
        [t for t in everything if not t.is_floating_point()],
    )
