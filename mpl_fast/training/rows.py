"""Images that pass through the networks in one step, counted in a step of the real algorithm.

The networks are linear stand-ins with a few weights, so that a batch of any size is fast.
"""

from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from mpl_fast import algorithms
from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import AlgorithmConfig, LearnerConfig
from mpl_fast.learner import Learner

SIDE = 2  # pixels of the stand-ins' images
CLASSES = 2


@dataclass
class StepRows:
    """Images in the passes of one step, summed over networks."""

    forward: int = 0
    """In forward passes, with or without a backward pass."""
    backward: int = 0
    """In backward passes."""
    tangent: int = 0
    """In passes of forward-mode differentiation, not counted as forward."""
    largest: int = 0
    """In the largest pass."""
    smallest: int = 0
    """In the smallest pass in which batch norm normalizes by the images that it is given."""
    held: int = 0
    """Maximum of images whose activations are saved at the same time."""
    held_passes: int = 0
    """Number of passes that saved these."""
    forward_passes: int = 0
    backward_passes: int = 0
    tangent_passes: int = 0
    updates: int = 0
    """By the optimizers, each after an exchange of gradients between ranks."""
    gradients: int = 0
    """That are exchanged between ranks and update nothing: the labeled ones of a feedback."""


def count(
    config: AlgorithmConfig,
    labeled: int,
    unlabeled: int,
    *,
    steps: int,
    step: int | None = None,
    microbatches: int = 1,
    norm_ranks: int = 1,
) -> StepRows:
    """Rows of step number `step` (default: the last) with a rank's labeled and unlabeled images.

    `norm_ranks`: over whose images batch norm normalizes in training mode, for `smallest`.
    """
    counter = _Counter(norm_ranks)

    def new_learner(learner: LearnerConfig) -> Learner:
        # The optimizer's backend changes no row, and some backends need a GPU; nor does a delay of
        # the trunk, whose gradient is computed as well.
        learner = replace(learner, optimizer_backend="torch", trunk_delay_steps=0)
        return _Counted(_StandIn(counter), learner, steps=steps)

    context = AlgorithmContext(microbatches=microbatches, classes=CLASSES)
    algorithm = algorithms.build(config, new_learner, context)
    train_step(algorithm, _batch(labeled, unlabeled), steps - 1 if step is None else step)
    return counter.found


class _Counted(Learner):
    """Counts what ranks exchange."""

    def optimizer_step(self) -> Tensor:
        """Counts an update."""
        self.network.counter.found.updates += 1
        return super().optimizer_step()

    def labeled_gradient(
        self, images: Tensor, labels: Tensor, statistics: Literal["batch", "running"] = "batch"
    ) -> tuple[list[Tensor], Tensor]:
        """Counts a gradient."""
        self.network.counter.found.gradients += 1
        return super().labeled_gradient(images, labels, statistics)


class _Saved:
    """Exists as long as autograd holds what a pass saved."""


class _Counter:
    """Counts the rows of passes and those whose activations are saved."""

    def __init__(self, norm_ranks: int) -> None:
        self.found, self._norm_ranks = StepRows(), norm_ranks
        self._held: WeakKeyDictionary[_Saved, int] = WeakKeyDictionary()

    def save(self, tensor: Tensor) -> tuple[_Saved, Tensor]:
        saved, found = _Saved(), self.found
        self._held[saved] = len(tensor)
        rows = sum(self._held.values())
        if rows > found.held:
            found.held, found.held_passes = rows, len(self._held)
        return saved, tensor

    def normalized(self, rows: int, *, training: bool) -> None:
        rows *= self._norm_ranks if training else 1
        self.found.smallest = min(self.found.smallest or rows, rows)

    def backward(self, gradient: Tensor) -> None:
        self.found.backward += len(gradient)
        self.found.backward_passes += 1

    def __deepcopy__(self, memo: object) -> "_Counter":
        """The copy of a network for averaged weights has the same counter."""
        return self


class _StandIn(nn.Module):
    """A linear network that counts its passes; its one product saves its input."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter
        self.norm = nn.BatchNorm2d(3, affine=False)  # is not applied: its state is read
        self.weight = nn.Parameter(torch.randn(3 * SIDE * SIDE, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of ``(N, 3, 2, 2)`` images."""
        found, rows = self.counter.found, len(images)
        found.largest = max(found.largest, rows)
        if self.training or self.norm.running_mean is None:
            self.counter.normalized(rows, training=self.training)
        if forward_ad.unpack_dual(self.weight).tangent is not None:
            found.tangent += rows
            found.tangent_passes += 1
        else:
            found.forward += rows
            found.forward_passes += 1
        with saved_tensors_hooks(self.counter.save, lambda saved: saved[1]):
            logits = images.flatten(1) @ self.weight
        if logits.requires_grad:
            logits.register_hook(self.counter.backward)
        return logits


def _batch(labeled: int, unlabeled: int) -> Batch:
    views = [torch.randn(n, 3, SIDE, SIDE) for n in (labeled, unlabeled, unlabeled)]
    labels = [torch.arange(n) % CLASSES for n in (labeled, unlabeled)]
    return Batch(views[0], labels[0], views[1], views[2], labels[1])
