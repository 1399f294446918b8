"""A network together with everything that trains it.

Gradient averaging over ranks, mixed precision, compilation, clipping and the weight average are
decided here and nowhere else, so an algorithm is written as for one device.
"""

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
from mpl_fast.learner import compilation
from mpl_fast.learner.batch_norm import BatchNormStats, batch_statistics
from mpl_fast.learner.jvp import EPSILON, WeightDerivative
from mpl_fast.learner.optimizer import ClippedOptimizer
from mpl_fast.learner.rng import DropoutMaskDtype
from mpl_fast.learner.weight_average import WeightAverage
from mpl_fast.models.head import head_prefixes

# A scalar loss, or logits with the gradient of a loss by them.
Term = Tensor | tuple[Tensor, Tensor]


class Learner:
    """Runs forward passes, takes optimizer steps and keeps an average of the weights.

    Replicas stay identical: each optimizer step averages gradients and batch-norm statistics over
    ranks. If the averaged gradient is not finite, all ranks skip the step: weights, momentum and
    statistics stay as they were. `skipped` (0-dim) counts such steps since the last good one.
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
        self._average = WeightAverage(self.network, config) if config.ema else None
        self.average = self._average.network if self._average else None
        compilation.compile_in_place(
            self.network, compiled, graphs=graphs == "model", ddp=grad_sync == "ddp"
        )
        self._replica = _replicate(self.network, self.device, grad_sync)
        trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.parameters = [*trained.values()]
        # For each parameter, whether it waits for the end of a delay of the trunk.
        head = head_prefixes(self.network) if config.trunk_delay_steps else ("",)
        self._in_trunk = [not name.startswith(head) for name in trained]
        self.trunk_delayed = False
        self._optimizer = ClippedOptimizer(self.network, config, lr_tensor=graphs == "step")
        self.optimizer = self._optimizer.optimizer
        self._bn_stats = BatchNormStats(self.network)
        self._bn_changed = False  # by a forward pass since statistics were averaged over ranks
        self._derivative = WeightDerivative(self.network)
        self._ended, self._frozen = -1, False
        self.skipped, self._skipped_now = (torch.zeros((), device=self.device) for _ in range(2))

    def __call__(self, *views: Tensor) -> Tensor:
        """Logits ``(N, C)`` of all views in one forward pass, normalized as one batch.

        Each view is ``(n, 3, H, W)``; rows come in the order of the views.
        """
        self._bn_changed = True
        with self._autocast():
            logits: Tensor = self._replica(joined(views))
        return logits

    @torch.no_grad()
    def forward_no_grad(self, *views: Tensor) -> Tensor:
        """What `__call__` returns, dropout included, without gradient and without an update of the
        running statistics."""
        with batch_statistics(self.network), self._autocast():
            logits: Tensor = self.network(joined(views))
        return logits

    @torch.no_grad()
    def forward_batch_stats(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` in evaluation mode, but normalized by the statistics of these images.

        Running statistics are neither read nor updated. They lag behind the weights, so right after
        an update the labeled loss under them would be too high.
        """
        with batch_statistics(self.network):
            return self._evaluate(self.network, images)

    def labeled_gradient(
        self, images: Tensor, labels: Tensor, statistics: Literal["batch", "running"] = "batch"
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of the cross-entropy, a list like `parameters` averaged over ranks, and the
        loss of this rank.

        The logits are those of `forward_batch_stats`, or, with running statistics, of `infer`. The
        gradient is by the weights that this step trains: 0 by those of a delayed trunk.
        """
        of_batch = batch_statistics(self.network) if statistics == "batch" else nullcontext()
        with of_batch:
            logits = self._evaluate(self.network, images)
        loss = losses.smoothed_ce(logits, labels).loss
        gradient = list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        mean_over_ranks_(gradient)
        if self.trunk_delayed:
            gradient = [
                torch.zeros_like(g) if waits else g
                for g, waits in zip(gradient, self._in_trunk, strict=True)
            ]
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
        """The derivative ``(N, C)`` of the logits at `weights` along `direction`.

        With `training`, of a training pass, which draws dropout from the generators in their
        present state and does not update running statistics; else of `infer`.
        """
        if method != "auto":
            self._derivative.method = method
        of_batch = batch_statistics(self.network) if training else nullcontext()
        dropout = DropoutMaskDtype(torch.bfloat16) if self.bf16 else nullcontext()
        self.network.train(training)
        try:
            with of_batch, dropout:
                return self._derivative.jvp(weights, direction, images, epsilon)
        finally:
            self.network.train()

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of the network in evaluation mode."""
        return self._evaluate(self.network, images)

    @torch.no_grad()
    def infer_average(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of the averaged network, or of the network if none is averaged."""
        return self._evaluate(self.average or self.network, images)

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

    def backward(self, *terms: Term, microbatches: int = 1) -> None:
        """Accumulates the gradient of the sum of the terms, divided by `microbatches`.

        A term is a scalar loss, or logits with a loss's gradient by them. Terms without gradient
        are constants and are left out.
        """
        roots, gradients = [], []
        for term in terms:
            root, gradient = (term, None) if isinstance(term, Tensor) else term
            if not root.requires_grad:
                continue
            if microbatches > 1:
                root = root / microbatches if gradient is None else root
                gradient = None if gradient is None else gradient / microbatches
            roots.append(root)
            gradients.append(gradient)
        torch.autograd.backward(roots, gradients)

    def optimizer_step(self) -> Tensor:
        """One clipped optimizer step with the accumulated gradient, which is then cleared.

        Returns the effective learning rate, 0-dim on the device: how far SGD moved the weights per
        unit of this gradient, lr (1 + momentum) under Nesterov, else lr, times the clipping factor;
        NaN if the step was skipped. (Movement by earlier gradients, through the momentum, does not
        count.)
        """
        if self.trunk_delayed:
            # Optimizers leave out parameters without a gradient: weights, momentum, step counters.
            for parameter, waits in zip(self.parameters, self._in_trunk, strict=True):
                parameter.grad = None if waits else parameter.grad
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._average_over_ranks(gradients)
        clipping, finite = self._optimizer.step(gradients, update=not self._frozen)
        self._bn_stats.rollback(finite)
        for parameter in self.parameters:
            parameter.grad = None
        # In place, here and in `end_step`: a CUDA graph of the step has fixed addresses.
        self._skipped_now.add_(~finite)
        ahead = 1.0 + self.config.momentum if self.config.nesterov else 1.0
        return torch.where(finite, clipping * (self._optimizer.device_lr * ahead), torch.nan)

    def _average_over_ranks(self, gradients: list[Tensor]) -> None:
        """The one collective of an optimizer step; DDP has averaged the gradients already."""
        statistics = self._bn_stats.tensors if self._bn_changed else []
        ddp = isinstance(self._replica, DistributedDataParallel)
        mean_over_ranks_(statistics if ddp else [*gradients, *statistics])
        self._bn_changed = False

    def freeze(self) -> None:
        """Until the next `begin_step`, optimizer steps change neither weights nor momentum."""
        self._frozen = True
        self._optimizer.lr = 0.0

    @property
    def frozen(self) -> bool:
        """Whether `freeze` was called in this step."""
        return self._frozen

    @property
    def lr(self) -> float:
        """The learning rate of the present step."""
        return self._optimizer.lr

    def begin_step(self, step: int) -> None:
        """Sets the learning rate: a function of the step's number, so nothing has to be resumed."""
        self.network.train()
        if self._ended < 0:
            self._bn_stats.snapshot()
        self._frozen = False
        self.trunk_delayed = self.config.trunk_delayed_at(step)
        self._optimizer.lr = self.config.lr_at(step, self.steps)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Updates the weight average and `skipped`, once in a step: later calls do nothing more
        than to average the statistics of passes that came after the last update."""
        if self._bn_changed:
            mean_over_ranks_(self._bn_stats.tensors)
            self._bn_stats.rollback()
            self._bn_changed = False
        if self._ended == step:
            return
        self._ended = step
        self.skipped.copy_((self.skipped + 1.0) * (self._skipped_now > 0))
        self._skipped_now.zero_()
        if self._average:
            self._average.update(step)

    def finite(self) -> Tensor:
        """Whether all weights and statistics are finite: 0-dim bool on the device."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        norms = torch._foreach_norm([t for t in tensors if t.is_floating_point()])
        return torch.stack(list(norms)).sum().isfinite()

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics, their average and the optimizer's state."""
        average = self.average.state_dict() if self.average is not None else None
        optimizer = self._optimizer.state_dict()
        return {"network": self.network.state_dict(), "average": average, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._bn_stats.snapshot()
        self.skipped.zero_()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _replicate(network: nn.Module, device: torch.device, grad_sync: GradientSync) -> nn.Module:
    if world_size() == 1 or grad_sync == "allreduce":
        return network
    # `optimizer_step` averages the statistics; the option was renamed in torch 2.13.
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    renamed = "forward_sync_buffers" in options
    sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    wrap: Any = DistributedDataParallel
    replica: nn.Module = wrap(network, device_ids=ids, **sync)
    return replica
