"""What only a GPU can show of a training step: no host synchronization, graphs."""

from typing import Any

import pytest
import torch

from mpl_fast import algorithms
from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.batch import Batch
from mpl_fast.config.run import Graphs
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode, mark_step
from mpl_fast.models import build
from mpl_fast.training.step_graph import StepGraph
from tests.algorithms.problems import VARIANTS

pytestmark = pytest.mark.gpu


def batch(device: str) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 32, 32, generator=g).to(device, torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (40,), generator=g).to(device)
    return Batch(images[:8], labels[:8], images[8:], images[8:].flip(0), labels[8:])


@pytest.mark.parametrize("recipe", VARIANTS)
def test_a_step_never_waits_for_the_device(recipe: str) -> None:
    algorithm = algorithms.build(
        VARIANTS[recipe],
        lambda c: Learner(
            build("wrn_10_1", 10, dropout=0.1), c, steps=100, device="cuda:0", bf16=True
        ),
        AlgorithmContext(classes=10),
    )
    data = batch("cuda")
    for t in range(3):  # warm up: libraries synchronize when they are loaded
        train_step(algorithm, data, t)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(3, 6):
            metrics = train_step(algorithm, data, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in metrics.values())


GRAPHED = ["supervised", "supervised mixup", "uda", "fixmatch", "fixmatch adaptive"]
GRAPHED += [
    "mpl difference",
    "mpl sampled",
    "smpl difference",
    "mpl_roleplay",
    "mpl held_out baseline masked",
]


def images(t: int) -> Batch:
    """Another batch for each step."""
    data = batch("cuda")
    return data._replace(**{n: getattr(data, n).roll(t, 0) for n in ("labeled", "weak", "strong")})


def trained(recipe: str, graphs: Graphs, compiled: Mode = "off") -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    algorithm = algorithms.build(
        VARIANTS[recipe],
        lambda c: Learner(
            build("wrn_10_1", 10, dropout=0.3),
            c,
            steps=100,
            device="cuda:0",
            bf16=True,
            compiled=compiled,
            graphs=graphs,
        ),
        AlgorithmContext(classes=10),
    )
    repeated = StepGraph(algorithm)
    rows = []
    for t in range(16):
        mark_step()
        step = repeated.step if graphs == "step" else algorithm.step
        metrics = train_step(algorithm, images(t), t, step)
        rows.append({name: value.tolist() for name, value in metrics.items()})
    return {n: learner.state_dict() for n, learner in algorithm.learners.items()}, rows


@pytest.mark.parametrize("recipe", GRAPHED)
def test_graphs_of_the_step_are_the_step_bit_for_bit(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    (state, rows), (graphed, graphed_rows) = (trained(recipe, g) for g in ("off", "step"))
    assert graphed_rows == rows
    for name, learner in state.items():
        for key, value in learner["network"].items():
            assert torch.equal(graphed[name]["network"][key], value), f"{name}.{key}"


@pytest.mark.parametrize("recipe", ["mpl difference", "mpl exact", "smpl difference"])
def test_graphs_of_compiled_networks_change_nothing(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass of the student comes between the teacher's forward and backward passes."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    (_, rows), (_, graphed) = (trained(recipe, graphs, "default") for graphs in ("off", "model"))
    for one, two in zip(rows, graphed, strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3)
