"""The memory that `--dry-run` computes is what PyTorch's allocator takes on the device."""

import gc
import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.config import AlgorithmConfig
from mpl_fast.config.run import Graphs
from mpl_fast.dry_run import estimate
from mpl_fast.dry_run.network import measure
from mpl_fast.models import build
from mpl_fast.training.rows import count
from mpl_fast.training.step_graph import WARMUP, StepGraph
from tests.algorithms.problems import MPL, UDA
from tests.null_gpu import machine

pytestmark = pytest.mark.slow
STEP, STEPS = 50, 100


class Case(NamedTuple):
    """A network, a recipe, and one rank's batch."""

    model: str
    classes: int
    size: int  # pixels
    labeled: int
    unlabeled: int
    config: AlgorithmConfig
    microbatches: int = 1
    graphs: Graphs = "off"


RECOMPUTE = replace(MPL, teacher_graph="recompute")
CASES = {
    "resnet50 mpl": Case("resnet50", 1000, 224, 32, 224, MPL),
    "resnet50 uda": Case("resnet50", 1000, 224, 32, 224, UDA),
    "wrn mpl": Case("wrn_28_2", 10, 32, 64, 448, MPL),
    "resnet50 recompute": Case("resnet50", 1000, 224, 32, 224, RECOMPUTE, 4),
    "resnet50 mpl graph": Case("resnet50", 1000, 224, 32, 224, MPL, graphs="step"),
    "wrn mpl graph": Case("wrn_28_2", 10, 32, 64, 448, MPL, graphs="step"),
}


def peak(case: Case) -> dict[str, int | float]:
    """Bytes that the dry run computes and the allocator's peak; in a process on the null GPU."""
    from tests.null_gpu.training import DEVICE, batch, new

    config, rows = case.config, (case.labeled, case.unlabeled)
    counted = count(config, *rows, steps=STEPS, step=STEP, microbatches=case.microbatches)
    network = build(case.model, case.classes, 0.1)
    cost = measure(network, case.size, device=DEVICE, bf16=True)
    setting = estimate.Setting(config, *rows, case.size, True, case.graphs != "off")
    gc.collect()  # a capture would, and free what other cases have left
    before = torch.cuda.memory_allocated()
    context = AlgorithmContext(microbatches=case.microbatches)
    options: dict[str, Any] = {"classes": case.classes, "graphs": case.graphs, "context": context}
    algorithm = new(config, model=case.model, **options)
    step = StepGraph(algorithm).step if case.graphs == "step" else None
    images = batch(*rows, case.size)
    for t in range(STEP, STEP + WARMUP):
        train_step(algorithm, images, t, step)
    torch.cuda.reset_peak_memory_stats()
    for t in range(STEP + WARMUP, STEP + WARMUP + 2):  # the first one is captured
        train_step(algorithm, images, t, step)
    found = torch.cuda.max_memory_allocated() - before
    return {"computed": sum(estimate.memory(setting, counted, cost)), "allocated": found}


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, float]]:
    """What `peak` found."""
    found: dict[str, dict[str, float]] = json.loads(machine.run("tests.null_gpu.test_memory"))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_step_is_what_the_dry_run_computes(
    case: str, peaks: dict[str, dict[str, float]]
) -> None:
    assert peaks[case]["computed"] == pytest.approx(peaks[case]["allocated"], rel=0.1)


if __name__ == "__main__":
    print(json.dumps({name: peak(case) for name, case in CASES.items()}))
