"""Steps as CUDA graphs: a capture is legal and complete, and a replay is one launch. Steps, also
those before it on another stream, and the copy for a checkpoint do not race."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from mpl_fast.algorithms.base import Metrics, train_step
from mpl_fast.learner.compilation import Mode
from mpl_fast.training.saving import HostCopy
from mpl_fast.training.step_graph import WARMUP, Replay, StepGraph
from tests.null_gpu import machine

pytestmark = pytest.mark.slow
STEPS = 16
Found = dict[str, Any]
BESIDE = 20  # launches of a step beside its graph
COMPILING = 3  # first steps of compiled networks, which wait


def measure() -> Found:
    """What the steps of each variant did, and which copies race; in a process on the null GPU."""
    from tests.null_gpu.training import ALL

    found = {name: steps(name) for name in ALL}
    return {"steps": found, "races": [how for how in COPIES if races(how)]}


def steps(
    name: str, compiled: Mode = "off", network: Callable[[], nn.Module] | None = None
) -> Found:
    """Trains a variant with graphs of its steps."""
    from tests.null_gpu.training import ALL, batch, new, watched

    def capture(work: Replay) -> Replay:
        torch.cuda.set_sync_debug_mode("default")  # a capture begins with the end of all work
        replay = graph._captured(work)
        torch.cuda.set_sync_debug_mode("error")
        return replay

    algorithm, images = new(ALL[name], network=network, compiled=compiled, graphs="step"), batch()
    graph, sources = StepGraph(algorithm, capture), set[str]()
    found: Found = {"faults": [], "captures": 0, "replays": 0, "collectives": []}
    settled = 1  # the first step without anything that only a beginning needs
    for t in range(STEPS):

        def step(t: int = t) -> Metrics:
            return train_step(algorithm, images, t, graph.step)

        if compiled != "off" and t < COMPILING:
            step()
            continue
        faults, seen = watched(step)
        captured = seen.lines("CAPTURED")
        if captured:
            settled = t + 2  # what it holds is no longer there for the next step's copies
        usual = ("SYNC", "HOSTALLOC") if captured else "HOSTALLOC" if t < settled else ()
        found["faults"] += [f"step {t}: {line}" for line in faults if not line.startswith(usual)]
        found["faults"] += reused(seen.lines("MEMCPY pinned"), sources)
        sources |= {line.split()[-1] for line in captured if "MEMCPY pinned" in line}
        found["collectives"] += [line for line in captured if "nccl" in line]
        found["captures"] += bool(captured)
        found["replays"] += seen.graph_launches
    return found | {"launches": seen.launches}


@contextmanager
def _too_early() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@contextmanager
def _too_late() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


COPIES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "queued": nullcontext,
    "too early": _too_early,
    "too late": _too_late,
}


def races(how: str) -> bool:
    """Whether PyTorch's sanitizer finds that a copy for a checkpoint and steps are not ordered."""
    from torch.cuda import _sanitizer

    from tests.null_gpu.training import ALL, batch, new

    _sanitizer.enable_cuda_sanitizer()
    algorithm, images, host = new(ALL["supervised"], graphs="step"), batch(), HostCopy()
    graph, learners = StepGraph(algorithm), algorithm.learners
    try:
        for t in range(WARMUP):
            train_step(algorithm, images, t, graph.step)
            with COPIES[how]():
                host.take({name: learner.state_dict() for name, learner in learners.items()})
    except _sanitizer.CUDASanitizerErrors:
        return True
    return False


def reused(copies: list[str], sources: set[str]) -> list[str]:
    """Copies that change the host memory which a graph copies from."""
    return [f"of a graph: {line}" for line in copies if line.split()[-1] in sources]


@pytest.fixture(scope="module")
def found() -> Found:
    """What `measure` found."""
    measured: Found = json.loads(machine.run("tests.null_gpu.test_step_graphs"))
    return measured


GRAPHED = {
    "supervised", "supervised mixup", "finetune", "uda", "uda cosine", "uda split", "uda adamw",
    "fixmatch", "fixmatch adaptive", "noisy_student", "noisy_student argmax", "mpl off",
    "mpl difference", "mpl sampled", "mpl split", "mpl held_out baseline masked", "mpl drop_path",
    "mpl_roleplay", "smpl off", "smpl difference",
}  # fmt: skip


def test_a_capture_is_legal_and_a_replay_does_not_wait(found: Found) -> None:
    """Nothing refused, nothing escaped to another stream, no host memory of the graph reused."""
    assert {name: of["faults"] for name, of in found["steps"].items() if of["faults"]} == {}


def test_the_steps_that_a_graph_can_repeat_are_one_launch(found: Found) -> None:
    """Of role playing there are two graphs; other launches are copies of the batch and averages."""
    graphed = {name: of for name, of in found["steps"].items() if of["captures"]}
    assert graphed.keys() == GRAPHED
    assert {n: of["captures"] for n, of in graphed.items() if of["captures"] > 1} == {
        "mpl_roleplay": 2
    }
    for name, of in graphed.items():
        assert of["replays"] >= 7, name
        assert of["launches"] <= BESIDE, name


def test_the_copy_for_a_checkpoint_comes_between_two_steps(found: Found) -> None:
    """And of copies that do not, the sanitizer finds each."""
    assert found["races"] == ["too early", "too late"]


def test_a_changed_source_of_a_graph_is_found() -> None:
    copies = ["MEMCPY pinned->device 8 bytes from 0x10", "MEMCPY pinned->device 8 bytes from 0x20"]
    assert reused(copies, {"0x20"}) == [f"of a graph: {copies[1]}"]


if __name__ == "__main__":
    print(json.dumps(measure()))
