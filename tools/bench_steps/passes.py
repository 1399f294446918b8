"""How many passes through a network a recipe's step makes, counted in a real step."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpl_fast import algorithms
from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.config import AlgorithmConfig, LearnerConfig
from mpl_fast.learner import Learner
from tools.bench_steps.setting import STEPS, Setting, batch

WITH_GRADIENT = 3.0  # a backward pass costs two forward ones
WITH_DERIVATIVE = 3.0  # convolved are images by weights, and the change of each by the other


def forward_count(recipe: str, config: AlgorithmConfig, labeled: int, mu: int) -> float:
    """What a step costs, in forward passes of one image.

    A row of a forward pass counts 1, or 3 with its backward pass, or 3 if it carries a forward
    derivative along. The network is a tiny one: rows do not depend on it.
    """
    passed = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        nonlocal passed
        cost = WITH_GRADIENT if logits.requires_grad else 1.0
        if _carries_derivative(logits):
            cost = WITH_DERIVATIVE
        passed += cost * len(logits)

    def new_learner(learner: LearnerConfig) -> Learner:
        last = nn.Linear(3 * 2 * 2, 10)
        last.register_forward_hook(count)  # derivatives go past a network's own hooks
        return Learner(nn.Sequential(nn.Flatten(), last), learner, steps=STEPS)

    algorithm = algorithms.build(config, new_learner, AlgorithmContext(0, 1000))
    tiny = Setting("wrn_10_1", labeled, mu, 2, torch.device("cpu"))
    train_step(algorithm, batch(tiny, recipe), 0)
    return passed


def _carries_derivative(logits: Tensor) -> bool:
    """Whether a forward-mode derivative is being taken."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(logits).tangent is not None
