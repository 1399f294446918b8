"""How one network is trained: optimizer, learning rate over time, moving average."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How this network is trained: optimizer, learning rate over time, moving average."""

    lr: float = 0.4
    """Peak learning rate for the whole (global) batch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """adamw's second decay rate is 0.999."""
    optimizer_backend: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused kernels: PyTorch's, or those of NVIDIA's apex where it is installed (sgd only).
    auto is torch: the same numbers, with clipping in the same pass."""
    momentum: float = 0.9
    """Of SGD; adamw's first decay rate."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on weight matrices and filters (adamw: decoupled); norms and biases have none."""
    max_grad_norm: float = 5.0
    """Largest gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "constant", "step", "exponential", "onecycle"] = "cosine"
    """After the warm-up: down to 0 by half a cosine, or no change, or by `gamma` at each of
    `milestones`, or by `gamma` in all, or up for 30 % of the run and down again (no warm-up)."""
    milestones: tuple[int, ...] = ()
    """Steps at which schedule step multiplies the rate by `gamma`."""
    gamma: float = 0.1
    """Factor of schedule step at each milestone, of schedule exponential over the whole run."""
    warmup: int = 5000
    """Steps from learning rate 0 up to `lr`, after `delay_steps`."""
    delay_steps: int = 0
    """Steps at learning rate 0 before the warm-up."""
    ema: float = 0.0
    """Decay of the moving average of weights and statistics, which is what gets evaluated; 0 keeps
    none."""
    dropout: float = 0.1
    """Share of the pooled features that is dropped in training."""
    conventions: Literal["official", "kekmodel"] = "official"
    """kekmodel, for parity with that code: after `delay_steps` the warm-up continues from where it
    would be without the delay, the average's decay does not warm up, statistics are copied, and all
    parameters without "bn" in their names are decayed, biases too."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (from 0) in a run of `steps`."""
        after = step - self.delay_steps
        if after < 0:
            return 0.0
        if self.schedule == "onecycle":
            return self.lr * _one_cycle(after, steps - self.delay_steps)
        if after < self.warmup:
            if self.conventions == "kekmodel":
                return self.lr * (step / (self.delay_steps + self.warmup))
            return self.lr * (after + 1) / self.warmup
        progress = (after - self.warmup) / max(1, steps - self.delay_steps - self.warmup)
        if self.conventions != "kekmodel":  # whose cosine rises again after the last step
            progress = min(1.0, progress)
        return self.lr * self._decay(step, progress)

    def _decay(self, step: int, progress: float) -> float:
        """What is left of the peak after a share of the steps that follow the warm-up."""
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.schedule == "step":
            return self.gamma ** sum(step >= m for m in self.milestones)
        return self.gamma**progress if self.schedule == "exponential" else 1.0


def _one_cycle(step: int, steps: int) -> float:
    """Share of the peak: cosines from 1/25 up to 1 and down to 4e-6, as in torch's OneCycleLR."""
    top = 0.3 * steps - 1.0
    if step <= top:
        low, high, progress = 1 / 25, 1.0, step / max(top, 1.0)
    else:
        low, high, progress = 1.0, 1 / 25e4, (step - top) / max(steps - 1 - top, 1.0)
    return high + (low - high) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
