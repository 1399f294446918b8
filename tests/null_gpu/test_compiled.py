"""Compiled networks: no break of the graph, nothing compiled again, no wait of the host; and steps
of them as CUDA graphs.

What was compiled for one pass serves the passes of all networks and recipes that have as many rows,
the same mode and gradients alike, so a process compiles few passes for all variants.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.config import AlgorithmConfig
from mpl_fast.config.run import Graphs
from mpl_fast.learner.compilation import mark_step
from tests.null_gpu import machine
from tests.null_gpu.test_step_graphs import BESIDE, GRAPHED, steps

pytestmark = pytest.mark.slow
WARMUP, STEPS = 5, 2
# What each variant compiles that none before it did: 14 passes in all, forward and backward. They
# differ in rows, in whether they have gradients and train, and in the statistics of batch norm.
COMPILED = {
    "supervised": 1,  # the labeled images
    "uda": 1,  # all views
    "uda split": 2,  # weak views without gradient; labeled images and strong views
    "mpl off": 2,  # strong views; labeled images without gradient, evaluated by their statistics
    "mpl per_example": 1,  # the latter with gradient
    "mpl parity_kekmodel": 1,  # labeled images, trained on without gradient
    "mpl parity_google": 1,  # labeled images, evaluated
    "mpl held_out baseline masked": 2,  # as `uda` and `mpl off` with half of the labeled images
    "mpl exact split recompute": 1,  # weak views without gradient and running statistics
    "noisy_student": 1,  # weak views without gradient, evaluated
    "metasemi": 1,  # labeled images with gradient, evaluated
}
VARIANT = "mpl difference"  # whose passes are graphs, too
PASSES = 6  # forward and backward of teacher and student, and the labeled images twice
Found = dict[str, Any]


def measure() -> Found:
    """What compiled steps did, one by one and as graphs; in a process on the null GPU."""
    import torch

    from tests.null_gpu.training import ALL, one_block

    # As training sets it. A pass is compiled for one setting, and a central difference restores it.
    torch.backends.cuda.matmul.allow_tf32 = True
    return {
        "alone": {name: compiled_steps(config, one_block) for name, config in ALL.items()},
        "step": {name: steps(name, "default", one_block) for name in ALL},
        "model": compiled_steps(ALL[VARIANT], one_block, "model"),
    }


def compiled_steps(
    config: AlgorithmConfig,
    network: Callable[[], nn.Module],
    graphs: Graphs = "off",
    warmup: int = WARMUP,
) -> Found:
    """What the steps of a recipe compiled, and what they did afterwards."""
    from torch._dynamo.utils import counters

    from tests.null_gpu.training import batch, new, watched

    counters.clear()
    algorithm = new(config, network=network, compiled="default", graphs=graphs)
    images = batch()

    def steps(first: int, last: int) -> None:
        for t in range(first, last):
            mark_step()
            train_step(algorithm, images, t)

    steps(0, warmup)  # compiles, which waits
    compiled = counters["stats"]["unique_graphs"]
    faults, seen = watched(lambda: steps(warmup, warmup + STEPS))
    steps(warmup + STEPS, warmup + STEPS + 1)  # to compile while watched is an error
    return {
        "faults": faults,
        "fused": len(seen.lines("KERNEL triton:triton_")),
        "graphs": seen.graph_launches / STEPS,
        "breaks": dict(counters["graph_break"]),
        "compiled": compiled,
        "compiled_again": counters["stats"]["unique_graphs"] - compiled,
    }


@pytest.fixture(scope="module")
def found() -> Found:
    """What `measure` found."""
    measured: Found = json.loads(machine.run("tests.null_gpu.test_compiled"))
    return measured


def _of_each(found: Found, what: str) -> Found:
    """One of the things found, of those variants that have it."""
    return {name: of[what] for name, of in found.items() if of[what]}


def test_compiled_networks_have_no_break_and_do_not_wait(found: Found) -> None:
    alone = found["alone"]
    assert _of_each(alone, "faults") == {}
    assert _of_each(alone, "breaks") == {}
    assert _of_each(alone, "compiled_again") == {}
    assert _of_each(alone, "compiled") == COMPILED
    assert all(of["fused"] for of in alone.values())


def test_steps_of_compiled_networks_are_graphs(found: Found) -> None:
    """The same that are graphs otherwise: captured legally, once for each form of the step."""
    step = found["step"]
    assert _of_each(step, "faults") == {}
    captures = _of_each(step, "captures")
    assert captures == {name: 2 if name == "mpl_roleplay" else 1 for name in GRAPHED}
    for name in GRAPHED:
        assert step[name]["replays"] >= 7, name
        assert step[name]["launches"] <= BESIDE, name


def test_compiled_passes_are_graphs(found: Found) -> None:
    model = found["model"]
    assert (model["faults"], model["breaks"], model["compiled_again"]) == ([], {}, 0)
    assert model["fused"] == 0  # they are not launched one by one
    assert model["graphs"] == PASSES


if __name__ == "__main__":
    print(json.dumps(measure()))
