"""What only a GPU can show of training: NCCL, no host synchronization, graphs, whole runs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast import algorithms
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config.run import Graphs
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode, mark_step
from mpl_fast.models import build
from mpl_fast.training.step_graph import StepGraph
from tests.algorithms.problems import VARIANTS
from tests.tiny_run import arguments, command, environment, run

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


GRAPHED = ["supervised", "supervised mixup", "uda", "fixmatch", "mpl difference", "mpl sampled"]
GRAPHED += ["smpl difference", "mpl_roleplay", "mpl held_out baseline masked"]


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


@pytest.mark.parametrize("where", ["gpu", "cpu"])
@pytest.mark.parametrize("policy", ["mpl", "dali"])
def test_a_run_under_nccl_stops_and_resumes(
    where: str, policy: str, tiny_rec: Path, tmp_path: Path
) -> None:
    """torchrun with one rank on CUDA, DALI on either device; stopped once and resumed."""
    folder = tmp_path / "run"
    options = [*arguments(folder, tiny_rec), "--data.policy", policy, "--data.device", where]
    options += ["--device", "cuda", "--deterministic", "false"]
    launched = command(options)
    launcher = [launched[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    for extra in (["--stop-at", "3"], []):
        done = subprocess.run(
            [*launcher, *launched[1:], *extra],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["count"] == 50


def test_compiled_run_on_the_gpu(tiny_rec: Path, tmp_path: Path) -> None:
    options = arguments(tmp_path / "run", tiny_rec)
    options += ["--device", "cuda", "--compile", "default", "--deterministic", "false"]
    done = run(options)
    assert done.returncode == 0, done.stderr
