"""The interface that every algorithm has."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.learner import Learner

Metrics = dict[
    str, Tensor
]  # zero-dimensional, detached and still on the device: no step ever waits
NewLearner = Callable[[LearnerConfig], Learner]


class Algorithm(Protocol):
    """A way to train; structural, so there is no base class to inherit from."""

    learners: dict[str, Learner]  # all that is scheduled, averaged, saved and resumed
    voters: list[Learner]  # whose averaged weights are evaluated, together

    def step(self, batch: Batch, t: int) -> Metrics:
        """Updates the learners once, in step number `t` (from 0)."""


def train_step(algorithm: Algorithm, batch: Batch, t: int) -> Metrics:
    """Wraps a step in what all algorithms share: learning rates before, averages after."""
    for learner in algorithm.learners.values():
        learner.begin(t)
    metrics = algorithm.step(batch, t)
    for learner in algorithm.learners.values():
        learner.end(t)
    return metrics


@torch.no_grad()
def predict(algorithm: Algorithm, images: Tensor) -> Tensor:
    """The mean probability that the voters give each class, ``(N, C)`` float32."""
    votes = [voter.infer_average(images).float().softmax(-1) for voter in algorithm.voters]
    return torch.stack(votes).mean(0)
