"""Training of one network: optimizer, learning-rate schedule, moving average."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from mpl_fast.config.fields import FractionBelow1, NonNegativeFloat, NonNegativeInt, OneOf


class Schedule(NamedTuple):
    """A learning-rate schedule.

    `factor` is the share of the peak rate at a step, from the config, the step's number counted
    from the end of the delay, and the number of steps from there to the end of the run.
    """

    factor: Callable[["LearnerConfig", int, int], float]
    warmup: bool = True  # preceded by a linear warm-up


def _constant(config: "LearnerConfig", step: int, steps: int) -> float:
    return 1.0


def _cosine(config: "LearnerConfig", step: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _progress(config, step, steps)))


def _step(config: "LearnerConfig", step: int, steps: int) -> float:
    passed = sum(config.delay_steps + step >= m for m in config.milestones)
    return float(config.gamma**passed)


def _exponential(config: "LearnerConfig", step: int, steps: int) -> float:
    return float(config.gamma ** _progress(config, step, steps))


def _onecycle(config: "LearnerConfig", step: int, steps: int) -> float:
    """Half cosines from 1/25 up to 1 and down to 4e-6, as torch's OneCycleLR."""
    top = 0.3 * steps - 1.0
    if step <= top:
        low, high, progress = 1 / 25, 1.0, step / max(top, 1.0)
    else:
        low, high, progress = 1.0, 1 / 25e4, (step - top) / max(steps - 1 - top, 1.0)
    return high + (low - high) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _progress(config: "LearnerConfig", step: int, steps: int) -> float:
    """Share of the steps after the warm-up that are done."""
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    # kekmodel's cosine rises again after the last step.
    return progress if config.conventions == "kekmodel" else min(1.0, progress)


SCHEDULES = {
    "cosine": Schedule(_cosine),
    "constant": Schedule(_constant),
    "step": Schedule(_step),
    "exponential": Schedule(_exponential),
    "onecycle": Schedule(_onecycle, warmup=False),
}


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Training of one network: optimizer, learning-rate schedule, moving average."""

    lr: NonNegativeFloat = 0.4
    """Peak learning rate, for the batch of all ranks together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW with betas (`momentum`, 0.999)."""
    optimizer_backend: Literal["auto", "torch", "apex"] = "auto"
    """Fused optimizer of PyTorch, or of NVIDIA's apex where it is installed (sgd only). auto is
    torch, which computes the same numbers with clipping in the same pass."""
    momentum: FractionBelow1 = 0.9
    """Momentum of sgd; first beta of adamw."""
    nesterov: bool = True
    """Nesterov momentum (sgd only)."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty of sgd, decoupled weight decay of adamw, on weight matrices and filters; biases
    and normalization layers have none."""
    max_grad_norm: NonNegativeFloat = 5.0
    """Largest norm of the gradient, above which it is clipped; 0: no clipping."""
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    """Learning rate after the warm-up. cosine: down to 0 by half a cosine. constant: no change.
    step: times `gamma` at each of `milestones`. exponential: down to `gamma` times `lr` at the end.
    onecycle: no warm-up; up for 30 % of the run, then down."""
    milestones: tuple[int, ...] = ()
    """Steps at which schedule step multiplies the learning rate by `gamma`."""
    gamma: NonNegativeFloat = 0.1
    """Factor of schedule step at each milestone, and of schedule exponential over the whole run."""
    warmup: NonNegativeInt = 5000
    """Steps in which the learning rate rises linearly from 0 to `lr`, after `delay_steps`."""
    delay_steps: NonNegativeInt = 0
    """Steps at learning rate 0 before the warm-up."""
    trunk_delay_steps: NonNegativeInt = 0
    """Steps after `delay_steps` in which only the last layer is trained, for pretrained weights
    (LP-FT, arXiv 2202.10054). `max_grad_norm` and a feedback are then of that layer alone. Batch
    norm is as in all steps: by the batch, and its running statistics follow the new images."""
    ema: FractionBelow1 = 0.0
    """Decay of the moving average of weights and batch-norm statistics, which is then evaluated in
    place of the network itself; 0: no average."""
    dropout: FractionBelow1 = 0.1
    """Dropout rate of the pooled features."""
    drop_path: FractionBelow1 = 0.0
    """Stochastic depth: probability with which the last residual branch is left out for an image in
    training; the rate rises linearly from 0 at the first. 0: none is left out. Not for networks
    without residual branches."""
    conventions: Literal["official", "kekmodel"] = "official"
    """kekmodel reproduces kekmodel/MPL-pytorch: the warm-up counts from step 0 and takes
    `delay_steps` + `warmup` steps, the average's decay has no warm-up, batch-norm statistics are
    copied into the average, and all parameters without "bn" in their names are decayed, biases
    too."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (from 0) in a run of `steps`."""
        after = step - self.delay_steps
        if after < 0:
            return 0.0
        schedule = SCHEDULES[self.schedule]
        if schedule.warmup and after < self.warmup:
            if self.conventions == "kekmodel":
                return self.lr * (step / (self.delay_steps + self.warmup))
            return self.lr * (after + 1) / self.warmup
        return self.lr * schedule.factor(self, after, steps - self.delay_steps)

    def trunk_delayed_at(self, step: int) -> bool:
        """Whether step number `step` (from 0) trains the last layer only."""
        return self.trunk_delay_steps > max(0, step - self.delay_steps)

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        found = []
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            found.append("momentum must be above 0 with nesterov, not 0")
        if self.optimizer_backend == "apex" and self.optimizer != "sgd":
            found.append("optimizer_backend apex is for optimizer sgd: set torch")
        steps = self.milestones
        if self.schedule != "step" and steps:
            found.append(f"milestones must be empty for schedule {self.schedule}, not {steps}")
        if self.schedule == "step" and not (steps and steps[0] >= 0 and _rising(steps)):
            found.append(f"milestones must be the rising steps of schedule step, not {steps}")
        return found


def _rising(steps: tuple[int, ...]) -> bool:
    return list(steps) == sorted(set(steps))
