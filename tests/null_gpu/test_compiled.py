"""Compiled networks: no break of the graph, nothing compiled again, no wait of the host."""

import json
from typing import Any

import pytest

from mpl_fast.algorithms.base import train_step
from mpl_fast.config.run import Graphs
from mpl_fast.learner.compilation import mark_step
from tests.null_gpu import machine
from tests.null_gpu.test_step_graphs import BESIDE, steps

pytestmark = pytest.mark.slow
VARIANT = "mpl difference"
GRAPHS: list[Graphs] = ["off", "model"]
STEP_GRAPHS = {"mpl difference": 1, "uda": 1, "smpl difference": 1, "mpl_roleplay": 2}
WARMUP, STEPS = 5, 2
COMPILED = 3  # teacher, student, and student without gradients
PASSES = 6  # forward and backward of these, and the labeled images twice; each is one graph
Found = dict[str, Any]


def measure() -> Found:
    """What compiled steps did, without and with graphs; in a process on the null GPU."""
    found: Found = {graphs: _steps(graphs) for graphs in GRAPHS}
    return found | {"step": {name: steps(name, "default") for name in STEP_GRAPHS}}


def _steps(graphs: Graphs) -> Found:
    from torch._dynamo.utils import counters

    from tests.null_gpu.training import ALL, batch, new, watched

    counters.clear()
    algorithm, images = new(ALL[VARIANT], compiled="default", graphs=graphs), batch()

    def steps(first: int, last: int) -> None:
        for t in range(first, last):
            mark_step()
            train_step(algorithm, images, t)

    steps(0, WARMUP)  # compiles, which waits
    compiled = counters["stats"]["unique_graphs"]
    faults, seen = watched(lambda: steps(WARMUP, WARMUP + STEPS))
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


@pytest.mark.parametrize("graphs", GRAPHS)
def test_compiled_networks_have_no_break_and_do_not_wait(graphs: Graphs, found: Found) -> None:
    steps = found[graphs]
    assert steps["faults"] == []
    assert steps["breaks"] == {}
    assert (steps["compiled"], steps["compiled_again"]) == (COMPILED, 0)
    assert bool(steps["fused"]) == (graphs == "off")  # in graphs they are not launched one by one
    assert steps["graphs"] == (PASSES if graphs == "model" else 0)


@pytest.mark.parametrize("name", STEP_GRAPHS)
def test_steps_of_compiled_networks_are_graphs(name: str, found: Found) -> None:
    """Captured legally, once for each form of the step, and then one launch."""
    of = found["step"][name]
    assert of["faults"] == []
    assert of["captures"] == STEP_GRAPHS[name]
    assert of["replays"] >= 7
    assert of["launches"] <= BESIDE


if __name__ == "__main__":
    print(json.dumps(measure()))
