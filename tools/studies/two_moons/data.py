"""Two moons with six labels: the points, and all random choices, drawn before any training.

Every variant has the same labels, initial weights and batches, so differences between two of them
are paired run by run. (Uniforms of sampled labels: `mpl_fast.learner.rng`, by seed and step.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpl_fast.batch import Batch
from tools.studies.two_moons.networks import WIDTHS, Weights, as_rows

Setting = Literal["3/3", "5/1"]
SETTINGS: dict[Setting, tuple[int, int]] = {"3/3": (3, 3), "5/1": (5, 1)}
POINTS, NOISE, BATCH = 2000, 0.2, 16  # 6 of the points have a label

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size and seed of the study."""

    draws: int = 20
    inits: int = 10
    steps: int = 1000
    seed: int = 0
    labels: Literal["spread", "random"] = "spread"
    """spread: as in the published notebook, evenly along each moon, plus noise; a single label of
    a moon is then always near its tip. random: any six of the points."""

    @property
    def runs(self) -> int:
        """Run d * inits + i has label draw d and initial weights i of that draw."""
        return self.draws * self.inits


class Problem(NamedTuple):
    """R runs of one setting, or of several one after the other."""

    points: Tensor  # (P, 2) float64
    truth: Tensor  # (P,) int64; only the variant with all labels learns it
    labeled: Tensor  # (R, 6, 2) float64; the last two: the last label of each class
    labels: Tensor  # (R, 6) int64
    batches: Tensor  # (steps, R, 16) int64, rows of `points` without a label
    teacher: Weights  # initial; also those of variants with one network
    student: Weights
    unseen: Tensor  # (2000, 2) float64, for accuracy
    unseen_truth: Tensor  # (2000,) int64

    def batch(self, t: int, all_labels: bool = False) -> Batch:
        """Step t's batch; weak and strong views are the points themselves."""
        rows = as_rows(self.batches[t])
        points, truth = self.points[rows], self.truth[rows]
        if all_labels:
            return Batch(points, truth, points, points, truth)
        return Batch(as_rows(self.labeled), as_rows(self.labels), points, points, truth)


def problem(setting: Setting, options: Options) -> Problem:
    """The runs of a setting. Both settings have the same points and initial weights."""
    labeled, labels, points, truth, free = _six_labels(setting, options)
    unseen, unseen_truth = _moons(_state(options.seed, 1), (POINTS // 2, POINTS // 2))
    shape = (options.steps, options.draws, options.inits * BATCH)
    picked = _generator(options.seed, 3).integers(free.shape[1], size=shape)
    batches = np.take_along_axis(free[None], picked, 2)
    weights = _generator(options.seed, 5)
    return Problem(
        points=torch.from_numpy(points),
        truth=torch.from_numpy(truth),
        labeled=torch.from_numpy(labeled).repeat_interleave(options.inits, 0),
        labels=torch.from_numpy(labels).repeat_interleave(options.inits, 0),
        batches=torch.from_numpy(batches.reshape(options.steps, options.runs, BATCH)),
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
        teacher=[*map(torch.cat, zip(*(p.teacher for p in problems), strict=True))],
        student=[*map(torch.cat, zip(*(p.student for p in problems), strict=True))],
    )


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def _state(seed: int, stream: int) -> np.random.RandomState:
    return np.random.RandomState(_generator(seed, stream).integers(2**32))


def _moons(state: np.random.RandomState, numbers: tuple[int, int]) -> tuple[Array, Array]:
    """Points (N, 2) and classes (N,) of so many points a moon, evenly along it, plus noise."""
    from sklearn.datasets import make_moons

    points, truth = make_moons(numbers, shuffle=False, noise=NOISE, random_state=state)
    return np.asarray(points, np.float64), np.asarray(truth, np.int64)


def _six_labels(setting: Setting, options: Options) -> tuple[Array, Array, Array, Array, Array]:
    """Labeled points (draws, 6, 2) and labels (draws, 6), all points (P, 2), classes (P,), and each
    draw's rows without a label (draws, 1994)."""
    cloud, state = _state(options.seed, 0), _state(options.seed, 2)
    half, (zeros, ones) = POINTS // 2, SETTINGS[setting]
    order = [*range(zeros - 1), *range(zeros, zeros + ones - 1), zeros - 1, zeros + ones - 1]
    if options.labels == "spread":
        points, truth = _moons(cloud, (half - 3, half - 3))
        pairs = [_moons(state, (zeros, ones)) for _ in range(options.draws)]
        labeled, labels = (np.stack(arrays)[:, order] for arrays in zip(*pairs, strict=True))
        return labeled, labels, points, truth, np.tile(np.arange(len(points)), (options.draws, 1))
    points, truth = _moons(cloud, (half, half))
    picked = np.stack([_some(state, truth, (zeros, ones)) for _ in range(options.draws)])[:, order]
    free = np.stack([np.setdiff1d(np.arange(POINTS), rows) for rows in picked])
    return points[picked], truth[picked], points, truth, free


def _some(state: np.random.RandomState, truth: Array, numbers: tuple[int, int]) -> Array:
    """Rows of so many points of each class, none twice."""
    classes = [np.flatnonzero(truth == label) for label in range(len(numbers))]
    return np.concatenate(
        [state.choice(rows, n, replace=False) for rows, n in zip(classes, numbers, strict=True)]
    )


def _initial(generator: np.random.Generator, runs: int) -> Weights:
    """Initialized as `torch.nn.Linear`: uniform within 1 / sqrt(inputs)."""
    tensors = []
    for inputs, outputs in pairwise(WIDTHS):
        bound = inputs**-0.5
        for shape in ((runs, outputs, inputs), (runs, 1, outputs)):
            tensors.append(torch.from_numpy(generator.uniform(-bound, bound, shape)))
    return tensors
