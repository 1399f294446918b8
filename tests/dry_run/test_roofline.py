"""The time computed for a GPU: kernels by hand, exchanges by hand, and published throughputs."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

from mpl_fast import models
from mpl_fast.config import LearnerConfig, MPLConfig, RunConfig, SupervisedConfig
from mpl_fast.config.cards import CARDS, Card
from mpl_fast.dry_run import network
from mpl_fast.dry_run import trace as tracing
from mpl_fast.dry_run.network import NetworkCost, measure
from mpl_fast.dry_run.roofline import (
    BOUNDS,
    Bound,
    Job,
    Machine,
    all_reduce_seconds,
    forecast,
    launches,
    pass_seconds,
    step_seconds,
)
from mpl_fast.dry_run.trace import Kernel, Passes, trace
from mpl_fast.training.rows import StepRows, count
from tests.algorithms.problems import VARIANTS

LAUNCHES = Path(__file__).parents[1] / "null_gpu" / "launches.json"
SIDE, IN, OUT, CLASSES = 8, 3, 4, 5
PIXELS = SIDE * SIDE
CARD = Card("round numbers", bf16=1e9, tf32=5e8, memory=1e9, bandwidth=1e6, links=1e5)
FULL = Bound(compute=1.0, memory=1.0, links=1.0, kernel=0.0, launch=0.0)
WEIGHTS = NetworkCost(100, 400, 500, 0, 0, 0.0, 0.0, 0.0)  # 100 parameters
PASSES = Passes([Kernel(1e6, 100.0, 50.0, 2)], [Kernel(2e6, 100.0, 0.0, 3), Kernel(0, 300, 0, 1)])


def plain() -> nn.Module:
    """A convolution without bias, ReLU out of place, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(IN, OUT, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(OUT * PIXELS, CLASSES, bias=False),
    )


def test_bytes_and_flops_of_each_kernel_by_hand() -> None:
    forward, backward = trace(plain(), SIDE, bf16=False, compiled=False)
    image, activation, logits = 4 * IN * PIXELS, 4 * OUT * PIXELS, 4 * CLASSES
    conv, linear = 4 * IN * OUT * 9, 4 * OUT * PIXELS * CLASSES
    product = 2.0 * IN * OUT * 9 * PIXELS, 2.0 * OUT * PIXELS * CLASSES
    assert forward == [
        Kernel(product[0], image + activation, conv, 1),
        Kernel(0, 2 * activation, 0, 1),
        Kernel(0, 2 * activation, 0, 1),  # flattening channels_last is a copy
        Kernel(product[1], activation + logits, linear, 1),
    ]
    assert [kernel.flops for kernel in backward] == [product[1], product[1], 0, product[0]]
    weights, images, relu, convolution = backward
    assert weights[1:] == (logits + activation, linear, 1)
    assert images[1:] == (logits + activation, linear, 1)
    assert relu[1:] == (3 * activation, 0, 1)
    # Of the convolution only the gradient by the weights: images have none.
    assert convolution[1:] == (activation + image, 2 * conv, 1)


def norm() -> nn.Module:
    """A convolution, batch norm and ReLU in place, and another convolution."""
    return nn.Sequential(
        nn.Conv2d(IN, OUT, 1, bias=False),
        nn.BatchNorm2d(OUT),
        nn.ReLU(inplace=True),
        nn.Conv2d(OUT, 1, 1, bias=False),
        nn.Flatten(),
    )


def test_a_compiler_saves_what_only_operators_between_two_products_exchange() -> None:
    eager, compiled = (trace(norm(), SIDE, bf16=False, compiled=on) for on in (False, True))
    activation = 4 * OUT * PIXELS
    # Statistics read x; then x is read and y written; then ReLU reads and writes y.
    fused = [kernel.bytes for kernel in eager.forward if kernel.bytes >= 2 * activation]
    assert fused == [3 * activation, 2 * activation]
    assert len(compiled.forward) == 3
    assert compiled.forward[1].bytes == 3 * activation
    assert compiled.forward[1].launches == 2
    # Backward: ReLU's mask, x and the gradient are read twice, its result is written once.
    second, fused_backward, first = compiled.backward
    assert (fused_backward.bytes, fused_backward.launches) == (7 * activation, 2)
    assert [k.bytes for k in eager.backward if not k.flops] == [3 * activation, 5 * activation]
    # The gradient of its output is read for that of the images and again for that of the weights.
    gradient = 4 * PIXELS
    assert (second.bytes, second.launches) == (2 * gradient + 2 * activation, 2)
    assert (first.bytes, first.launches) == (activation + 4 * IN * PIXELS, 1)


def test_a_value_that_only_the_backward_pass_needs_is_written() -> None:
    layers = nn.Conv2d(IN, OUT, 1, bias=False), nn.Sigmoid(), nn.Tanh(), nn.Conv2d(OUT, 1, 1)
    compiled = trace(nn.Sequential(*layers, nn.Flatten()), SIDE, bf16=False, compiled=True)
    assert compiled.forward[1].bytes == 3 * 4 * OUT * PIXELS  # reads one, writes both results


@pytest.mark.parametrize("name", ["wrn_10_1", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_products_are_not_computed_and_cost_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs() -> tuple[NetworkCost, Passes]:
        first, second = (models.build(name, 10, image_size=32) for _ in range(2))
        cost = measure(first, 32, device=torch.device("cpu"), bf16=False)
        return cost, trace(second, 32, bf16=False, compiled=True)

    calls = mock.Mock(side_effect=network.without_products)
    monkeypatch.setattr(network, "without_products", calls)
    found = costs()
    assert any(call.args[0] in network.PRODUCTS for call in calls.call_args_list)
    for module in (network, tracing):
        monkeypatch.setattr(module, "without_products", lambda func, a, k: func(*a, **k))
    assert costs() == found


def test_a_pass_takes_the_longer_of_flops_bytes_and_launch() -> None:
    bound = Bound(compute=0.5, memory=0.1, links=1.0, kernel=0.25, launch=0.0)
    flops, moved, short = Kernel(1e9, 1.0, 0.0, 1), Kernel(1.0, 1e5, 5e4, 1), Kernel(1, 1, 0, 2)
    assert pass_seconds([flops], 3, True, CARD, bound) == pytest.approx(3 * 1e9 / 0.5e9)
    assert pass_seconds([flops], 3, False, CARD, bound) == pytest.approx(3 * 1e9 / 0.25e9)
    assert pass_seconds([moved], 3, True, CARD, bound) == pytest.approx((3e5 + 5e4) / 1e5)
    assert pass_seconds([short], 3, True, CARD, bound) == 2 * 0.25
    assert pass_seconds([flops, short], 3, True, CARD, bound) == pytest.approx(6.5)


@pytest.mark.parametrize(
    ("ranks", "nodes", "seconds"),
    [
        (1, 1, 0.0),
        (8, 1, 2 * 7 / 8 * 400 / 1e5),
        (2, 2, 2 * 1 / 2 * 400 / 1e3),
        (16, 2, 2 * 7 / 8 * 400 / 1e5 + 2 * 1 / 2 * 400 / 1e3),
        (32, 4, 2 * 7 / 8 * 400 / 1e5 + 2 * 3 / 4 * 400 / 1e3),
    ],
)
def test_an_exchange_by_hand(ranks: int, nodes: int, seconds: float) -> None:
    machine = Machine(CARD, ranks, nodes, network=1e3)
    assert all_reduce_seconds(400, machine, FULL) == pytest.approx(seconds)
    half = replace(FULL, links=0.5)
    assert all_reduce_seconds(400, machine, half) == pytest.approx(2 * seconds)


ROWS = StepRows(forward=6, backward=4, forward_passes=2, backward_passes=1, updates=1)


def job(rows: StepRows = ROWS, **options: object) -> Job:
    learner = LearnerConfig(ema=0.9, momentum=0.9)
    config = RunConfig(algorithm=SupervisedConfig(learner=learner), **options)  # type: ignore[arg-type]
    return Job(config, rows, WEIGHTS, PASSES, bf16=True)


def test_a_step_by_hand() -> None:
    alone = step_seconds(job(), Machine(CARD, 1, 1, 1e3), FULL)
    forward = 2 * (3 * 1e6 / 1e9)  # 3 images a pass, whose 350 bytes take less
    backward = max(4 * 2e6 / 1e9, 400 / 1e6) + 4 * 300 / 1e6
    # Norm and update read the gradient, the update reads and writes weights and momentum.
    updates = (6 * 400 + 3 * 500) / 1e6
    assert alone.passes == pytest.approx(forward + backward)
    assert alone.updates == pytest.approx(updates)
    assert alone.exchange == alone.host == 0.0
    assert alone.total == pytest.approx(forward + backward + updates)
    two = step_seconds(job(), Machine(CARD, 2, 1, 1e3), FULL)
    assert two.exchange == pytest.approx(400 / 1e5)
    assert two.updates == pytest.approx(updates + 6 * 400 / 1e6)
    hidden = step_seconds(job(grad_sync="ddp"), Machine(CARD, 2, 1, 1e3), FULL)
    assert hidden.exchange == 0.0 and hidden.updates == alone.updates
    slow = step_seconds(job(grad_sync="ddp"), Machine(CARD, 2, 2, 1e3), FULL)
    assert slow.exchange == pytest.approx(400 / 1e3 - backward)


def test_norms_over_all_ranks_exchange_in_every_pass() -> None:
    """2 passes forward, 1 backward, 1 forward-mode, which exchanges statistics and derivatives."""
    slow, machine = replace(FULL, exchange=1.0), Machine(CARD, 2, 1, 1e3)
    rows = replace(ROWS, tangent=3, tangent_passes=1)
    synchronized = replace(job(rows), synchronized=7)
    gradients = 1.0 + 400 / 1e5
    assert step_seconds(job(rows), machine, slow).exchange == pytest.approx(gradients)
    both = step_seconds(synchronized, machine, slow).exchange
    assert both == pytest.approx(gradients + 7 * (2 + 1 + 2))
    assert step_seconds(synchronized, Machine(CARD, 1, 1, 1e3), slow).exchange == 0.0


def test_the_host_counts_when_it_takes_longer() -> None:
    slow = replace(FULL, launch=1.0)
    machine = Machine(CARD, 1, 1, 1e3)
    eager = step_seconds(job(), machine, slow)
    assert eager.host == 2 * 2 + 1 * 4 + 50
    assert eager.total == eager.host
    model = step_seconds(job(compile="default", cuda_graphs="model"), machine, slow)
    assert model.host == 2 + 1 + 50
    assert step_seconds(job(cuda_graphs="step"), machine, slow).host == 1
    tangent = replace(ROWS, tangent=3, tangent_passes=1, gradients=1)
    more = step_seconds(job(tangent), machine, slow)
    assert more.host == eager.host + 3 * 2
    assert more.passes == pytest.approx(eager.passes + 3 * 3 * 1e6 / 1e9)


@pytest.mark.parametrize("recipe", ["supervised", "uda", "mpl off", "mpl difference"])
def test_launches_are_those_that_the_null_gpu_counted(recipe: str) -> None:
    config = RunConfig(algorithm=VARIANTS[recipe])
    rows = count(config.algorithm, 8, 32, steps=100, step=50)
    passes = trace(models.build("wrn_10_1", 10, 0.1), 32, bf16=True, compiled=False)
    counted = json.loads(LAUNCHES.read_text())["bf16"][recipe]
    found = launches(Job(config, rows, WEIGHTS, passes, bf16=True))
    assert found == pytest.approx(counted, rel=0.1)


def test_exchanges_of_a_real_step_are_counted() -> None:
    rows = count(MPLConfig(), 8, 16, steps=100_000)
    assert (rows.updates, rows.gradients) == (2, 0)
    assert (rows.forward_passes, rows.backward_passes, rows.tangent_passes) == (4, 2, 0)
    exact = count(MPLConfig(feedback="exact"), 8, 16, steps=100_000)
    assert (exact.updates, exact.gradients, exact.tangent_passes) == (2, 1, 1)
    parts = count(SupervisedConfig(), 8, 0, steps=9, microbatches=4)
    assert (parts.updates, parts.forward_passes, parts.backward_passes) == (1, 4, 4)


def test_an_evaluation_is_a_forward_pass_in_batches() -> None:
    found = forecast(job(eval_batch=10), Machine(CARDS["h100"], 2, 1, 1e3), validation=60)
    for seconds, bound in zip(found.evaluations, BOUNDS, strict=True):
        of_five = pass_seconds(PASSES.forward, 5, True, CARDS["h100"], bound)
        assert seconds == pytest.approx(6 * of_five)
    assert found.evaluations[0] < found.evaluations[1]
    assert found.steps[0].total < found.steps[1].total


class Published(NamedTuple):
    """A training throughput of ResNet-50 v1.5, 224 pixels, channels last."""

    card: str
    gpus: int
    batch: int
    """Of a GPU."""
    bf16: bool
    """Or another 16-bit type; otherwise TF32."""
    compiled: bool
    """Or another way to fuse normalization with what is beside it."""
    images: float
    """A second."""


# docs/benchmarks.md has the sources.
PUBLISHED = {
    "PyTorch, 1 A100": Published("a100-80", 1, 256, True, False, 2470),
    "PyTorch, 8 A100": Published("a100-80", 8, 256, True, False, 16_621),
    "MXNet, 8 A100": Published("a100-80", 8, 512, True, True, 26_673.72),
    "MLPerf, 8 H100": Published("h100", 8, 400, True, True, 56_050),
}


@cache
def resnet50(compiled: bool) -> tuple[NetworkCost, Passes]:
    cpu, networks = torch.device("cpu"), [models.build("resnet50", 1000) for _ in range(2)]
    cost = measure(networks[0], 224, device=cpu, bf16=True)
    return cost, trace(networks[1], 224, bf16=True, compiled=compiled)


def computed(case: Published) -> list[float]:
    """Images a second at both bounds."""
    config = RunConfig(algorithm=SupervisedConfig(learner=LearnerConfig(ema=0.0)))
    rows = count(config.algorithm, case.batch, 0, steps=9)
    job = Job(config, rows, *resnet50(case.compiled), bf16=case.bf16)
    machine = Machine(CARDS[case.card], case.gpus, 1, network=50e9)
    return [case.gpus * case.batch / step_seconds(job, machine, b).total for b in BOUNDS]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_throughputs_lie_between_the_bounds(name: str) -> None:
    high, low = computed(PUBLISHED[name])
    assert low <= PUBLISHED[name].images <= high < 2.5 * low
