"""Operations, memory and checkpoint size from the rows of a step and the cost of a network."""

from dataclasses import dataclass
from typing import NamedTuple

from mpl_fast.config import (
    AlgorithmConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    NoisyStudentConfig,
    SMPLConfig,
)
from mpl_fast.dry_run.network import NetworkCost
from mpl_fast.training.rows import StepRows

PRODUCTS_OF_A_TANGENT = 3  # forward-mode differentiation of w x computes w x, dw x and w dx
IN_FLIGHT = 2  # activations that a layer reads and writes, besides the saved ones


class Memory(NamedTuple):
    """Bytes on one rank's device at the peak of a step, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float
    """Of weights, for a JVP along the labeled gradient."""
    images: float
    activations: float
    in_flight: float
    """What a layer reads and writes, besides the saved activations."""


@dataclass(frozen=True)
class Setting:
    """What the memory of a step depends on besides its rows and its network."""

    algorithm: AlgorithmConfig
    labeled: int
    """Images on this rank."""
    unlabeled: int
    """Images on this rank, each with two views."""
    side: int
    """Pixels."""
    bf16: bool
    graphs: bool = False
    """With CUDA graphs, which copy images to static buffers."""


def learners(algorithm: AlgorithmConfig) -> list[LearnerConfig]:
    """The config of each trained network."""
    if isinstance(algorithm, MPLConfig):
        return [algorithm.teacher, algorithm.student]
    return [algorithm.learner]


def has_fixed_teacher(algorithm: AlgorithmConfig) -> bool:
    """Whether a network that is not trained labels images: it is counted as one like the others."""
    return isinstance(algorithm, NoisyStudentConfig)


def step_flops(rows: StepRows, cost: NetworkCost) -> int:
    """FLOPs of one rank's step, without losses and optimizers, which are under one percent."""
    forward = rows.forward + PRODUCTS_OF_A_TANGENT * rows.tangent
    return forward * cost.forward + rows.backward * cost.backward


def memory(setting: Setting, rows: StepRows, cost: NetworkCost) -> Memory:
    """At the peak of a step."""
    trained = learners(setting.algorithm)
    number = 2 if setting.bf16 else 4  # bytes
    image = 3 * setting.side**2 * number
    return Memory(
        weights=cost.bytes * (len(trained) + has_fixed_teacher(setting.algorithm)),
        gradients=cost.trained_bytes * len(trained),
        optimizer=cost.trained_bytes * sum(map(moments, trained)),
        average=cost.bytes * sum(learner.ema > 0 for learner in trained),
        copies=cost.trained_bytes * _copies(setting.algorithm),
        images=image * (setting.labeled + 2 * setting.unlabeled) * (2 if setting.graphs else 1),
        activations=rows.held * cost.saved + rows.held_passes * cost.saved_once,
        in_flight=IN_FLIGHT * rows.largest * cost.largest,
    )


def checkpoint_bytes(algorithm: AlgorithmConfig, cost: NetworkCost) -> int:
    """Weights, averages and the optimizers' moments; generators and data positions are small."""
    return sum(
        cost.bytes * (2 if learner.ema else 1) + cost.trained_bytes * moments(learner)
        for learner in learners(algorithm)
    )


def moments(learner: LearnerConfig) -> int:
    """Tensors that an optimizer keeps for each weight."""
    if learner.optimizer == "adamw":
        return 2
    return 1 if learner.momentum else 0


def _copies(algorithm: AlgorithmConfig) -> int:
    """Weight-sized tensors of a JVP: weights before the student's step and labeled gradient; for a
    central difference also the scaled gradient and the shifted weights."""
    if isinstance(algorithm, MPLConfig | SMPLConfig):
        if algorithm.feedback not in ("exact", "per_example"):
            return 0
    elif not isinstance(algorithm, MetaSemiConfig):
        return 0
    return 4 if algorithm.derivative == "central" else 2
