"""How near each feedback's gradient is to the exact one, what it costs, and how long it takes."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpl_fast.algorithms import build
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.experiments.feedbacks_problems import (
    KINDS,
    LABELED,
    Kind,
    algorithm,
    gradients,
    meta_gradient,
    problem,
)
from mpl_fast.learner import Learner

CLOCKED = {"labeled": 16, "unlabeled": 112, "side": 16, "classes": 10}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured."""

    problems: int = 60  # with labels that are no matter of chance
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


@dataclass
class Passes:
    """Passes through one network in a step, by the rows that they take."""

    forward: dict[int, int]
    backward: dict[int, int]
    tangent: dict[int, int]  # forward passes that carry a derivative along


def nearness(kind: Kind, unlabeled: int, options: Options) -> Nearness:
    """Compares gradients of whole steps with autograd through the student's step."""
    cosines: list[float] = []
    errors, noises, sizes = [], [], []
    for number in range(options.drawn if kind.drawn else options.problems):
        given = problem(options.seed, number, unlabeled, options.scale)
        exact = meta_gradient(given)
        found = torch.stack([*gradients(kind, given, options.draws if kind.drawn else 1)])
        # Of a vector without direction, which rounding alone has made, the cosine is 0.
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
    """What a step asks of teacher and student, counted where their first layer is passed."""
    given = problem(0, 0, 16, 1.0)
    made = algorithm(kind, given)
    counted = {name: _count(learner.network) for name, learner in made.learners.items()}
    train_step(made, given.batch, 0)
    return counted


def _count(network: nn.Module) -> Passes:
    found = Passes({}, {}, {})

    def add(to: dict[int, int], rows: int) -> None:
        to[rows] = to.get(rows, 0) + 1

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = len(output)
        carries = forward_ad.unpack_dual(output).tangent is not None
        add(found.tangent if carries else found.forward, rows)
        if output.requires_grad:
            output.register_hook(lambda gradient: add(found.backward, rows))

    next(network.children()).register_forward_hook(note)
    return found


def seconds(options: Options) -> dict[str, list[float]]:
    """Seconds of a step of every feedback, one each round: the kinds take turns.

    A small convolutional network with batch norm in float32, whatever threads PyTorch has.
    """
    made = {name: _clocked(kind) for name, kind in KINDS.items()}
    batch = _images(options.seed)
    found: dict[str, list[float]] = {name: [] for name in made}
    for t in range(options.rounds + 2):  # two to warm up
        for name in _turned(list(made), t):
            began = time.perf_counter()
            train_step(made[name], batch, t)
            if t > 1:
                found[name].append(time.perf_counter() - began)
    return found


def relative(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of a step's time, as a multiple of feedback off in the same round."""
    rows = {}
    for name, times in found.items():
        ratios = [mine / off for mine, off in zip(times, found["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"low": low, "median": middle, "high": high}
    return rows


def _turned(names: list[str], by: int) -> Iterator[str]:
    cut = by % len(names)
    yield from names[cut:] + names[:cut]


def _clocked(kind: Kind) -> MetaPseudoLabels:
    learner = replace(LearnerConfig(), lr=0.05, warmup=0, schedule="constant")
    config = MPLConfig(
        teacher=learner, student=learner, consistency=ConsistencyConfig(ramp=0), **kind.options
    )
    torch.manual_seed(0)
    made = build(config, lambda given: Learner(_convolutional(), given, steps=1))
    assert isinstance(made, MetaPseudoLabels)
    return made


def _convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLOCKED["classes"])),
    )


def _images(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labeled, weak, strong = (
        torch.randn(CLOCKED[rows], 3, CLOCKED["side"], CLOCKED["side"], generator=g)
        for rows in ("labeled", "unlabeled", "unlabeled")
    )
    labels, truth = (
        torch.randint(CLOCKED["classes"], (len(x),), generator=g) for x in (labeled, weak)
    )
    return Batch(labeled, labels, weak, strong, truth)


def rows_of(counted: Passes) -> dict[str, dict[str, int]]:
    """The same with the rows by name: labeled, unlabeled, or all that are passed together."""
    names = {LABELED: "labeled", 16: "unlabeled"}
    whole = asdict(counted)
    return {
        what: {names.get(rows, "together"): n for rows, n in by_rows.items()}
        for what, by_rows in whole.items()
    }
