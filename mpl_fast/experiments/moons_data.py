"""Two moons with six labels: the points, and all that chance decides, drawn before any training.

Every contestant meets the same labels, initial weights, batches and uniforms, so that whatever
differs between two of them is theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpl_fast.experiments.moons_nets import WIDTHS, Net

Setting = Literal["3/3", "5/1"]
Places = Literal["spread", "random"]
SETTINGS: dict[Setting, tuple[int, int]] = {"3/3": (3, 3), "5/1": (5, 1)}
POINTS, NOISE, BATCH = 2000, 0.2, 16  # 6 of the points have a label

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was asked for."""

    draws: int = 20
    inits: int = 10
    steps: int = 1000
    seed: int = 0
    labels: Places = "spread"
    """spread: where the published notebook has them, evenly along each moon, plus noise; a single
    label of a moon is then always near its tip. random: any six of the points."""

    @property
    def runs(self) -> int:
        """Run d * inits + i has label draw d and initial weights i of that draw."""
        return self.draws * self.inits


class Problem(NamedTuple):
    """R runs of one setting, or of several one after the other."""

    points: Tensor  # (P, 2) float64
    truth: Tensor  # (P,) int64; only the contestant with all labels learns from it
    labeled: Tensor  # (R, 6, 2) float64
    labels: Tensor  # (R, 6) int64
    batches: Tensor  # (steps, R, 16) int64, rows of `points` that have no label
    uniforms: Tensor  # (steps, R, 16) float64, for sampled pseudo labels
    teacher: Net  # also the start of every contestant with one network
    student: Net
    unseen: Tensor  # (2000, 2) float64, what accuracy is measured on
    unseen_truth: Tensor  # (2000,) int64


def problem(setting: Setting, options: Options) -> Problem:
    """Everything that is the same for every contestant. Both settings have the same points, weights
    and uniforms."""
    labeled, labels, points, truth, free = _six_labels(setting, options)
    unseen, unseen_truth = _moons(_state(options.seed, 1), (POINTS // 2, POINTS // 2))
    shape = (options.steps, options.draws, options.inits * BATCH)
    places = _chance(options.seed, 3).integers(free.shape[1], size=shape)
    batches = np.take_along_axis(free[None], places, 2)
    uniforms = _chance(options.seed, 4).random((options.steps, options.runs, BATCH))
    weights = _chance(options.seed, 5)
    return Problem(
        points=torch.from_numpy(points),
        truth=torch.from_numpy(truth),
        labeled=torch.from_numpy(labeled).repeat_interleave(options.inits, 0),
        labels=torch.from_numpy(labels).repeat_interleave(options.inits, 0),
        batches=torch.from_numpy(batches.reshape(uniforms.shape)),
        uniforms=torch.from_numpy(uniforms),
        teacher=_initial(weights, options.runs),
        student=_initial(weights, options.runs),
        unseen=torch.from_numpy(unseen),
        unseen_truth=torch.from_numpy(unseen_truth),
    )


def stacked(problems: Sequence[Problem]) -> Problem:
    """The runs of all problems as one: twice the runs take hardly more time."""
    first = problems[0]
    return first._replace(
        labeled=torch.cat([p.labeled for p in problems]),
        labels=torch.cat([p.labels for p in problems]),
        batches=torch.cat([p.batches for p in problems], 1),
        uniforms=torch.cat([p.uniforms for p in problems], 1),
        teacher=Net(*map(torch.cat, zip(*(p.teacher for p in problems), strict=True))),
        student=Net(*map(torch.cat, zip(*(p.student for p in problems), strict=True))),
    )


def _chance(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def _state(seed: int, stream: int) -> np.random.RandomState:
    return np.random.RandomState(_chance(seed, stream).integers(2**32))


def _moons(state: np.random.RandomState, numbers: tuple[int, int]) -> tuple[Array, Array]:
    """Points (N, 2) and classes (N,) of so many points a moon, evenly along it, plus noise."""
    from sklearn.datasets import make_moons

    points, truth = make_moons(numbers, shuffle=False, noise=NOISE, random_state=state)
    return np.asarray(points, np.float64), np.asarray(truth, np.int64)


def _six_labels(setting: Setting, options: Options) -> tuple[Array, Array, Array, Array, Array]:
    """Labeled points (draws, 6, 2) and labels (draws, 6), class 0 first; all points (P, 2), classes
    (P,) and each draw's rows without a label (draws, 1994)."""
    cloud, state = _state(options.seed, 0), _state(options.seed, 2)
    half = POINTS // 2
    if options.labels == "spread":
        points, truth = _moons(cloud, (half - 3, half - 3))
        pairs = [_moons(state, SETTINGS[setting]) for _ in range(options.draws)]
        labeled, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return labeled, labels, points, truth, np.tile(np.arange(len(points)), (options.draws, 1))
    points, truth = _moons(cloud, (half, half))
    picked = np.stack([_some(state, truth, SETTINGS[setting]) for _ in range(options.draws)])
    free = np.stack([np.setdiff1d(np.arange(POINTS), rows) for rows in picked])
    return points[picked], truth[picked], points, truth, free


def _some(state: np.random.RandomState, truth: Array, numbers: tuple[int, int]) -> Array:
    """Rows of so many points of each class, none twice."""
    classes = [np.flatnonzero(truth == label) for label in range(len(numbers))]
    return np.concatenate(
        [state.choice(rows, n, replace=False) for rows, n in zip(classes, numbers, strict=True)]
    )


def _initial(chance: np.random.Generator, runs: int) -> Net:
    """As `torch.nn.Linear` begins: uniform within 1 / sqrt(inputs)."""
    tensors = []
    for inputs, outputs in pairwise(WIDTHS):
        bound = inputs**-0.5
        for shape in ((runs, outputs, inputs), (runs, outputs)):
            tensors.append(torch.from_numpy(chance.uniform(-bound, bound, shape)))
    return Net(*tensors)
