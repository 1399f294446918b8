"""The interface that every algorithm has."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.learner import Learner

Metrics = dict[
    str, Tensor
]  # zero-dimensional, detached and still on the device: no step ever waits
Step = Callable[[Batch, int], Metrics]
NewLearner = Callable[[LearnerConfig], Learner]


@dataclass(frozen=True)
class RunFacts:
    """What an algorithm needs to know of its run."""

    seed: int = 0
    epoch: int = 1  # steps in a pass over the unlabeled images
    microbatches: int = 1  # parts of a rank's batch that are computed one after the other


@dataclass(frozen=True)
class EvalEnsemble:
    """The networks whose averaged weights are evaluated, together."""

    learners: Sequence[Learner]
    mean_of: Literal["probability", "logits"] = "probability"


class Algorithm(Protocol):
    """A way to train; structural, so there is no base class to inherit from."""

    learners: dict[str, Learner]  # all that is scheduled, averaged, saved and resumed
    eval_ensemble: EvalEnsemble
    state: dict[str, Tensor]  # what else must be saved; moves in place, alike on every rank

    def step(self, batch: Batch, t: int) -> Metrics:
        """Updates the learners once, in step number `t` (from 0)."""

    def graph_key(self, t: int) -> Hashable | None:
        """Equal for steps that differ in nothing but images, draws, learning rates and what the
        step itself has moved on the device, so that a CUDA graph may repeat one for another; None
        for a step that is like no other, since a ramp is on its way."""


def train_step(algorithm: Algorithm, batch: Batch, t: int, step: Step | None = None) -> Metrics:
    """Wraps a step in what all algorithms share: learning rates before, averages after.

    `step` takes the place of the algorithm's own, which it repeats in another way.
    ``skipped/NAME`` is 1 where a learner's update was left out, for its gradient was not finite.
    """
    for learner in algorithm.learners.values():
        learner.begin_step(t)
    metrics = dict((step or algorithm.step)(batch, t))
    for name, learner in algorithm.learners.items():
        learner.end_step(t)
        metrics[f"skipped/{name}"] = learner.skipped.clamp(max=1.0)
    return metrics


@torch.no_grad()
def predict(algorithm: Algorithm, images: Tensor) -> Tensor:
    """The probability that the voters give each class, ``(N, C)`` float32."""
    voters = algorithm.eval_ensemble
    logits = torch.stack([voter.infer_average(images).float() for voter in voters.learners])
    if voters.mean_of == "logits":
        return logits.mean(0).softmax(-1)
    return logits.softmax(-1).mean(0)
