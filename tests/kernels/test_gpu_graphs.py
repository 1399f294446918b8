"""What only a GPU can show of the fused losses: no wait, graphs, launches, streams."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.kernels.gpu_problem import Problem, everything, gradient

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """The kernels, whatever the environment says."""
    with losses.use("triton"):
        yield


def launched(work: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that `work` puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    work()  # compiles
    names: list[str] = []
    for _ in range(2):  # the first time, the profiler itself is being loaded
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        # Regions of the host are seen on the device, too: annotations, which launch nothing.
        names = [
            event.name
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        ]
    return names


def test_nothing_waits_for_the_device() -> None:
    p = Problem(1000, 1000, torch.bfloat16)
    scale = torch.tensor(1024.0, device="cuda")
    everything(p)  # libraries synchronize when they are loaded
    p.teacher_and_grad(scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # it would be noticed
            p.feedback.item()
        everything(p)
        p.teacher_and_grad(scale)
        losses.mpl_feedback(p.uda_weight, p.feedback, p.weight[0].clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("width", [1000, 21848])
def test_a_replayed_graph_is_eager_bit_for_bit(width: int) -> None:
    classes = min(width, 21841)
    p = Problem(classes, width, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(p)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(p)
    first = [x.clone() for x in everything(p)]
    for seed in (1, 2):
        p.copy_from(Problem(classes, width, torch.bfloat16, seed))
        for x in captured:
            x.fill_(7)
        graph.replay()
        wanted = everything(p)
        assert all(torch.equal(x, y) for x, y in zip(captured, wanted, strict=True))
        assert not torch.equal(captured[0], first[0])


def test_launches() -> None:
    """By the design: a kernel and a sum with the gradient, one kernel for pseudo labels."""
    p = Problem(1000, 1000, torch.bfloat16)
    assert len(launched(p.teacher_and_grad)) <= 2, launched(p.teacher_and_grad)
    assert len(launched(p.student_and_grad)) <= 2, launched(p.student_and_grad)
    assert len(launched(p.weak)) == 1, launched(p.weak)
    with losses.use("reference"):
        assert len(launched(lambda: gradient(p.teacher().loss, p))) > 30


def test_two_streams_do_not_disturb_each_other() -> None:
    problems = [Problem(1000, 1000, torch.bfloat16, seed) for seed in (1, 2)]
    wanted = [everything(p) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    got: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for turn, (p, stream) in enumerate(zip(problems, streams, strict=True)):
            with torch.cuda.stream(stream):
                got[turn] = everything(p)
    torch.cuda.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
