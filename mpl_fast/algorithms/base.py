"""The interface of an algorithm, and the parts of a step that all algorithms share."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig
from mpl_fast.learner import Learner

# Detached, on the device: reading one would make the host wait for the step. 0-dim; or (2,), a sum
# and the number of its terms, for a mean over those images of an interval that a metric exists for.
Metrics = dict[str, Tensor]
Step = Callable[[Batch, int], Metrics]
LearnerFactory = Callable[[LearnerConfig], Learner]
Teacher = Callable[[Tensor], Tensor]  # of images (N, 3, H, W): logits (N, C), without gradient


@dataclass(frozen=True)
class AlgorithmContext:
    """What an algorithm depends on besides its own config."""

    seed: int = 0
    steps_per_epoch: int = 1  # steps in a pass over the unlabeled images
    microbatches: int = 1  # parts of a rank's batch that are computed one after the other
    teacher: Teacher | None = None  # a fixed one, from another run
    classes: int = 0  # of the logits, for algorithms with a state of each class


@dataclass(frozen=True)
class EvalEnsemble:
    """The learners whose averaged networks are evaluated as one classifier."""

    learners: Sequence[Learner]
    mean_of: Literal["probability", "logits"] = "probability"


class Algorithm(Protocol):
    """A training algorithm: a structural type, there is no base class to inherit from."""

    learners: dict[str, Learner]  # each is scheduled, averaged, saved and resumed
    eval_ensemble: EvalEnsemble
    state: dict[str, Tensor]  # what else is saved; updated in place, identical on all ranks

    def step(self, batch: Batch, t: int) -> Metrics:
        """Updates the learners once, in step number `t` (from 0); returns all metrics to log."""

    def graph_key(self, t: int) -> Hashable | None:
        """Which CUDA graph can replay step `t`: a key, such as "" where all steps are alike, or
        None if no graph can.

        Steps of equal keys launch the same kernels and differ only in what is read from the
        device: images, random draws, learning rates and the state that steps update there.
        """


def train_step(algorithm: Algorithm, batch: Batch, t: int, step: Step | None = None) -> Metrics:
    """Runs one step between what all algorithms share: learning rates before, averages after.

    `step` replaces the algorithm's own step (as `StepGraph.step` does). Adds the metrics
    ``skipped/NAME``: 1 if the learner's update was skipped because its gradient was not finite.
    """
    for learner in algorithm.learners.values():
        learner.begin_step(t)
    metrics = dict((step or algorithm.step)(batch, t))
    for name, learner in algorithm.learners.items():
        learner.end_step(t)
        metrics[f"skipped/{name}"] = learner.skipped.clamp(max=1.0)
    return metrics


def accuracy_of_known(share: Tensor, truth: Tensor) -> Tensor:
    """``(2,)``: how many labels equal the truth, and how many images have one (it is not -1).

    `share`, 0-dim: of all images, how many labels equal `truth` ``(U,)``.
    """
    known = (truth >= 0).sum(dtype=share.dtype)
    return torch.stack([share * len(truth), known])


@torch.no_grad()
def predict(algorithm: Algorithm, images: Tensor) -> Tensor:
    """Class probabilities ``(N, C)`` float32 of the evaluated ensemble."""
    ensemble = algorithm.eval_ensemble
    logits = torch.stack([member.infer_average(images).float() for member in ensemble.learners])
    if ensemble.mean_of == "logits":
        return logits.mean(0).softmax(-1)
    return logits.softmax(-1).mean(0)
