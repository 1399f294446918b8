"""A network together with everything that trains it.

How gradients cross ranks, mixed precision, compilation, clipping and the moving average are decided
here and nowhere else, so that an algorithm reads as if there were one device.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpl_fast.config import LearnerConfig
from mpl_fast.distributed import mean_over_ranks_, world_size


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
        self.optimizer = torch.optim.SGD(
            _groups(self.parameters, config.weight_decay),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=True,
            fused=self.device.type == "cuda",
        )

    def __call__(self, *views: Tensor) -> Tensor:
        """Logits ``(N, C)`` of all views in one forward pass, so that they share batch-norm
        statistics.

        `views` are ``(n, 3, H, W)`` each; the rows come back in their order.
        """
        images = views[0] if len(views) == 1 else torch.cat(views)
        with self._autocast():
            logits: Tensor = self._replica(images)
        return logits

    @torch.no_grad()
    def judge(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` without gradient or dropout, normalized by these images' own
        statistics.

        The running statistics are neither read nor touched. They lag behind the weights, so right
        after an update they make any network look worse than it is.
        """
        with _without_running_statistics(self.network):
            return self._evaluate(self.network, images)

    @torch.no_grad()
    def infer_average(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of the averaged weights, or of the weights if no average is kept."""
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

    def descend(self, loss: Tensor) -> None:
        """One clipped optimizer step down a scalar loss; the gradient is averaged over ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
        self.optimizer.step()

    def begin(self, step: int) -> None:
        """Sets the learning rate for a step: a function of its number, so there is nothing to
        resume."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(step, self.steps)

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Averages batch-norm statistics over ranks and moves the average towards the new weights.

        The decay warms up as ``min(ema, (1 + t) / (10 + t))``, as the official code has it.
        """
        statistics = [b for b in self.network.buffers() if b.is_floating_point()]
        mean_over_ranks_(statistics)
        if self.average is None:
            return
        kept, mine = _tensors(self.average), _tensors(self.network)
        decay = min(self.config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(kept[0], mine[0], 1.0 - decay)
        for k, m in zip(kept[1], mine[1], strict=True):  # counters
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


@contextmanager
def _without_running_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm without running statistics normalizes by the batch, in evaluation mode too."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.running_mean, m.running_var) for m in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, var


def _compile(network: nn.Module, mode: str) -> None:
    """Compiles in place, which keeps the parameters' names and serves `infer` too."""
    if mode == "off":
        return
    # Otherwise DDP's bucket boundaries would split the network into several graphs.
    torch._dynamo.config.optimize_ddp = False
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


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases, the parameters of at most one dimension, are not decayed."""
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": list(ps), "weight_decay": wd} for ps, wd in groups if ps]


def _tensors(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point weights and statistics, and integer counters."""
    everything: list[Tensor] = [*network.parameters(), *network.buffers()]
    return (
        [t for t in everything if t.is_floating_point()],
        [t for t in everything if not t.is_floating_point()],
    )
