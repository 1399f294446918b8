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

from mpl_fast import losses
from mpl_fast.batch import joined
from mpl_fast.config import LearnerConfig
from mpl_fast.config.run import GradientSync, Graphs
from mpl_fast.distributed import mean_over_ranks_, world_size
from mpl_fast.learner import compilation, optimizer
from mpl_fast.learner.batch_norm import BatchNormStats
from mpl_fast.learner.jvp import EPSILON, Derivative, own_statistics
from mpl_fast.learner.rng import DrawnAs

Term = Tensor | tuple[Tensor, Tensor]
Pairs = tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


class Learner:
    """Runs forward passes, takes gradient steps and keeps an average of its weights.

    Replicas stay identical: each update averages gradients and batch-norm statistics over ranks.
    A gradient that is not finite on any rank moves nothing on all of them: neither weights nor
    momentum nor statistics. `skipped` tells in how many steps, one after another, that was so.
    """

    def __init__(
        self,
        network: nn.Module,
        config: LearnerConfig,
        *,
        steps: int,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        compiled: compilation.Mode = "off",
        graphs: Graphs = "off",
        grad_sync: GradientSync = "allreduce",
    ) -> None:
        self.config, self.steps = config, steps
        self.device, self.bf16 = torch.device(device), bf16
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = _frozen_copy(self.network) if config.ema else None
        compilation.compile_in_place(self.network, compiled, graphs=graphs == "model")
        self._replica = _replicate(self.network, self.device, grad_sync)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._optimizer = optimizer.ClippedOptimizer(self.network, config, fixed=graphs == "step")
        self.optimizer = self._optimizer.optimizer
        self._bn_stats = BatchNormStats(self.network)
        self._averaged = _pairs(self.average, self.network, config) if self.average else ([], [])
        self._derivative = Derivative(self.network)
        self._ended, self._frozen, self._moved = -1, False, False
        self.skipped, self._left_out = (torch.zeros((), device=self.device) for _ in range(2))

    def __call__(self, *views: Tensor) -> Tensor:
        """Logits ``(N, C)`` of all views in one forward pass, so that they share batch-norm
        statistics.

        `views` are ``(n, 3, H, W)`` each; the rows come back in their order.
        """
        self._moved = True
        with self._autocast():
            logits: Tensor = self._replica(joined(views))
        return logits

    @torch.no_grad()
    def forward_no_grad(self, *views: Tensor) -> Tensor:
        """What calling this would give, dropout included, without gradient or any trace of it in
        the running statistics."""
        with own_statistics(self.network), self._autocast():
            logits: Tensor = self.network(joined(views))
        return logits

    @torch.no_grad()
    def forward_batch_stats(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` without gradient or dropout, normalized by these images' own
        statistics.

        The running statistics are neither read nor touched. They lag behind the weights, so right
        after an update they make any network look worse than it is.
        """
        return self._forward_batch_stats(images)

    def labeled_gradient(
        self, images: Tensor, labels: Tensor, statistics: Literal["own", "running"] = "own"
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of the cross-entropy, a list like `parameters` averaged over ranks, and the
        loss of this rank.

        The logits are those of `forward_batch_stats`, or, with running statistics, of `infer`.
        """
        run = statistics == "running"
        logits = self._evaluate(self.network, images) if run else self._forward_batch_stats(images)
        loss = losses.smoothed_ce(logits, labels).loss
        gradient = list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        mean_over_ranks_(gradient)
        return gradient, loss.detach()

    def weights(self) -> list[Tensor]:
        """A copy of the trained parameters."""
        return [p.detach().clone() for p in self.parameters]

    def jvp(
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
                return self._derivative.jvp(weights, direction, images, epsilon)
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

    def _forward_batch_stats(self, images: Tensor) -> Tensor:
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

    def backward_and_step(self, *terms: Term) -> Tensor:
        """`backward` of the terms and `optimizer_step`; returns what `optimizer_step` returns."""
        self.backward(*terms)
        return self.optimizer_step()

    def backward(self, *terms: Term) -> None:
        """Adds the gradient of a sum to what the next `optimizer_step` goes down.

        A term is a scalar loss, or logits together with a loss's gradient by them.
        """
        roots = [term if isinstance(term, Tensor) else term[0] for term in terms]
        grad_logits = [None if isinstance(term, Tensor) else term[1] for term in terms]
        moved = [i for i, root in enumerate(roots) if root.requires_grad]  # not by constants
        torch.autograd.backward([roots[i] for i in moved], [grad_logits[i] for i in moved])

    def optimizer_step(self) -> Tensor:
        """One clipped optimizer step down all that was pushed.

        Returns, 0-dim on the device, how far SGD moved the weights for each unit of this gradient:
        lr (1 + momentum) under Nesterov, else lr, times the clipping; NaN if it was left out. (What
        older gradients moved through the momentum is not this loss's doing.)
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._exchange(gradients)
        clipping, finite = self._optimizer.step(gradients, moves=not self._frozen)
        self._bn_stats.rollback(finite)
        for parameter in self.parameters:
            parameter.grad = None
        # In place, here and in `settle`: a CUDA graph of the step knows addresses.
        self._left_out.add_(~finite)
        ahead = 1.0 + self.config.momentum if self.config.nesterov else 1.0
        return torch.where(finite, clipping * (self._optimizer.rate * ahead), torch.nan)

    def _exchange(self, gradients: list[Tensor]) -> None:
        """The one collective of an update; DDP has exchanged the gradients already."""
        statistics = self._bn_stats.tensors if self._moved else []
        exchanged = isinstance(self._replica, DistributedDataParallel)
        mean_over_ranks_(statistics if exchanged else [*gradients, *statistics])
        self._moved = False

    def freeze(self) -> None:
        """Until the next `begin_step`, updates change neither weights nor momentum."""
        self._frozen = True
        self._optimizer.lr = 0.0

    @property
    def frozen(self) -> bool:
        """Whether this is a step after `freeze`."""
        return self._frozen

    @property
    def lr(self) -> float:
        """The learning rate that `begin_step` has set."""
        return self._optimizer.lr

    def begin_step(self, step: int) -> None:
        """Sets the learning rate for a step: a function of its number, so there is nothing to
        resume."""
        self.network.train()
        if self._ended < 0:
            self._bn_stats.snapshot()
        self._frozen = False
        self._optimizer.lr = self.config.lr_at(step, self.steps)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Moves the average towards the new weights.

        The decay warms up as ``min(ema, (1 + t) / (10 + t))``, as the official code has it.
        """
        if self._moved:  # a pass after the last update
            mean_over_ranks_(self._bn_stats.tensors)
            self._bn_stats.rollback()
            self._moved = False
        if self._ended == step:  # an algorithm had a reason to move the average earlier
            return
        self._ended = step
        self.skipped.copy_((self.skipped + 1.0) * (self._left_out > 0))
        self._left_out.zero_()
        if self.average is None:
            return
        decay = min(self.config.ema, (1 + step) / (10 + step))
        if self.config.conventions == "kekmodel":
            decay = self.config.ema
        (kept, mine), (copies, originals) = self._averaged
        torch._foreach_lerp_(kept, mine, 1.0 - decay)
        if copies:
            torch._foreach_copy_(copies, originals)

    def finite(self) -> Tensor:
        """Whether every weight and statistic is a finite number: 0-d bool on the device."""
        everything = [*self.network.parameters(), *self.network.buffers()]
        norms = torch._foreach_norm([t for t in everything if t.is_floating_point()])
        return torch.stack(list(norms)).sum().isfinite()

    def state_dict(self) -> dict[str, Any]:
        """All that a continued run needs of this learner."""
        average = self.average.state_dict() if self.average is not None else None
        optimizer = self._optimizer.state_dict()
        return {"network": self.network.state_dict(), "average": average, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._bn_stats.snapshot()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _frozen_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


def _replicate(network: nn.Module, device: torch.device, grad_sync: GradientSync) -> nn.Module:
    if world_size() == 1 or grad_sync == "allreduce":
        return network
    # Batch-norm statistics are averaged in `optimizer_step`; the option was renamed in
    # torch 2.13.
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    modern = "forward_sync_buffers" in options
    sync = {"forward_sync_buffers" if modern else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    wrap: Any = DistributedDataParallel
    replica: nn.Module = wrap(network, device_ids=ids, **sync)
    return replica


def _pairs(average: nn.Module, network: nn.Module, config: LearnerConfig) -> Pairs:
    """What moves towards the network's values, and what copies them: each the average's tensors and
    the network's."""
    kept, mine = ([*n.parameters(), *n.buffers()] for n in (average, network))
    moving = [p.is_floating_point() for p in mine]
    if config.conventions == "kekmodel":  # which copies statistics
        parameters = len(list(network.parameters()))
        moving = [i < parameters for i in range(len(mine))]
    together = list(zip(moving, kept, mine, strict=True))
    moved, copied = ([(k, m) for yes, k, m in together if yes is w] for w in (True, False))
    return tuple(([k for k, _ in some], [m for _, m in some]) for some in (moved, copied))  # type: ignore[return-value]
