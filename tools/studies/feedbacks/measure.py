"""Error of each feedback's gradient, its passes through the networks, and its time."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpl_fast.algorithms import Algorithm, build
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.learner.learner import Learner
from tools.bench.clock import interleaved, seconds_of
from tools.studies.feedbacks.problems import (
    KINDS,
    LABELED,
    Kind,
    algorithm,
    gradients,
    meta_gradient,
    problem,
)

TIMED = {"labeled": 16, "unlabeled": 112, "side": 16, "classes": 10}
ROWS = {LABELED: "labeled", 16: "unlabeled"}  # of the counted step; other sizes are several views
Passes = dict[str, Counter[str]]  # forward, backward and jvp: how many passes with which rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured."""

    problems: int = 60  # without random labels
    drawn: int = 10  # of these with drawn labels
    draws: int = 80  # in each of these
    sizes: tuple[int, ...] = (4, 16, 64, 256)  # unlabeled images
    rounds: int = 25
    scale: float = 2.0  # of the networks' weights, in PyTorch's initial ones
    seed: int = 0


@dataclass(frozen=True)
class Nearness:
    """A feedback's gradients g against the exact one e, over problems (and draws, if drawn)."""

    cosine: float  # mean of cos(g, e)
    positive: float  # share of g with cos(g, e) > 0
    error: float | None  # |g - e| / |e|, mean over problems; None for drawn labels
    noise: float | None  # sd of g over draws / |expected g|, median over problems
    size: float | None  # <mean g, expected g> / |expected g|^2, mean over problems: 1 has no bias
    size_error: float | None  # its standard error over problems


def nearness(kind: Kind, unlabeled: int, options: Options) -> Nearness:
    """Compares gradients of whole steps with autograd through the student's step."""
    cosines: list[float] = []
    errors, noises, sizes = [], [], []
    for number in range(options.drawn if kind.drawn else options.problems):
        given = problem(options.seed, number, unlabeled, options.scale)
        exact = meta_gradient(given)
        found = torch.stack([*gradients(kind, given, options.draws if kind.drawn else 1)])
        # A vector that is rounding errors only has no direction: its cosine counts as 0.
        cosine = torch.cosine_similarity(found, exact[None], dim=-1)
        cosines += torch.where(found.norm(dim=-1) > 1e-12 * exact.norm(), cosine, 0.0).tolist()
        if kind.drawn:
            expected = kind.share(unlabeled) * exact
            noises.append(float((found.var(0).sum().sqrt()) / expected.norm()))
            sizes.append(float((found.mean(0) @ expected) / (expected @ expected)))
        else:
            errors.append(float((found[0] - exact).norm() / exact.norm()))
    return Nearness(
        statistics.fmean(cosines),
        statistics.fmean(float(c > 0) for c in cosines),
        statistics.fmean(errors) if errors else None,
        statistics.median(noises) if noises else None,
        statistics.fmean(sizes) if sizes else None,
        statistics.stdev(sizes) / len(sizes) ** 0.5 if len(sizes) > 1 else None,
    )


def passes(kind: Kind) -> dict[str, Passes]:
    """Passes of a step through teacher and student, counted at their first layers."""
    given = problem(0, 0, 16, 1.0)
    made = algorithm(kind, given)
    counts = {name: _count(learner.network) for name, learner in made.learners.items()}
    train_step(made, given.batch, 0)
    return counts


def _count(network: nn.Module) -> Passes:
    found: Passes = {name: Counter() for name in ("forward", "backward", "jvp")}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = ROWS.get(len(output), "together")
        dual = forward_ad.unpack_dual(output).tangent is not None
        found["jvp" if dual else "forward"][rows] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: found["backward"].update([rows]))

    next(network.children()).register_forward_hook(note)
    return found


def seconds(options: Options) -> dict[str, list[float]]:
    """Seconds of a step of every feedback, one a round: the kinds take turns.

    A small convolutional network with batch norm in float32, with PyTorch's present threads.
    """
    batch = _images(options.seed)
    steps = {name: partial(train_step, _timed(kind), batch, 0) for name, kind in KINDS.items()}
    return interleaved(steps, seconds_of, rounds=options.rounds, seed=options.seed)


def relative(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of a step's time, as a multiple of feedback off in the same round."""
    rows = {}
    for name, own in times.items():
        ratios = [mine / off for mine, off in zip(own, times["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"low": low, "median": middle, "high": high}
    return rows


def _timed(kind: Kind) -> Algorithm:
    learner = LearnerConfig(lr=0.05, warmup=0, schedule="constant")
    config = MPLConfig(
        teacher=learner, student=learner, consistency=ConsistencyConfig(ramp=0), **kind.options
    )

    def new_learner(given: LearnerConfig) -> Learner:
        network = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, TIMED["classes"])),
        )
        return Learner(network, given, steps=1)

    torch.manual_seed(0)
    return build(config, new_learner)


def _images(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labeled, weak, strong = (
        torch.randn(TIMED[rows], 3, TIMED["side"], TIMED["side"], generator=g)
        for rows in ("labeled", "unlabeled", "unlabeled")
    )
    labels, truth = (
        torch.randint(TIMED["classes"], (len(x),), generator=g) for x in (labeled, weak)
    )
    return Batch(labeled, labels, weak, strong, truth)
