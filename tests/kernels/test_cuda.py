"""What only a GPU can show of the fused losses: no wait, graphs, launches, streams, autocast."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import losses
from tests.kernels.cases import LOSSES, Arguments, flat

pytestmark = pytest.mark.gpu
ROWS = 42  # 14 labeled, weak and strong


class Problem(NamedTuple):
    """Arguments on the GPU; scalars and labels are tensors, so that a graph reads new values."""

    logits: Tensor
    arguments: Arguments
    uniforms: Tensor

    def copy_from(self, other: "Problem") -> None:
        """New numbers in the same memory, as in the next step of a captured graph."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.arguments, *self[::2]) if isinstance(x, Tensor)]


def problem(classes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Problem:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device="cuda", generator=generator)

    label = torch.randint(classes, (ROWS,), device="cuda", generator=generator)
    logits, other = ((draw(ROWS, classes) * 12.0).to(dtype) for _ in range(2))
    uda_weight, feedback = draw(2).unbind()
    a = Arguments(label, other, draw(ROWS), 0.1, 0.7, 0.3, uda_weight, feedback)
    return Problem(logits, a, draw(ROWS))


def everything(p: Problem) -> list[Tensor]:
    """All functions, all outputs, all gradients."""
    answers = [loss(p.logits, p.arguments) for loss in LOSSES.values()]
    sampled = losses.pseudo_labels(p.logits, uniforms=p.uniforms)
    return [*(x for answer in answers for x in flat(answer)), *sampled]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels, for every value of MPL_FAST_LOSSES."""
    with losses.use("triton"):
        yield


def launched(work: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that `work` launches on the device."""
    from torch.profiler import ProfilerActivity, profile

    work()  # compiles
    names: list[str] = []
    for _ in range(2):  # the first time, the profiler itself is being loaded
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        # Regions of the host are on the device's timeline, too: annotations, which launch nothing.
        names = [
            event.name
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        ]
    return names


def test_nothing_waits_for_the_device() -> None:
    p = problem(1000)
    everything(p)  # libraries synchronize when they are loaded
    number = p.arguments.label.new_tensor(0.5, dtype=torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # it would be detected
            number.item()
        everything(p)
        losses.mpl_feedback(number, number, number.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", [1000, 21848])
def test_a_replayed_graph_is_eager_bit_for_bit(classes: int) -> None:
    p = problem(classes)
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
        p.copy_from(problem(classes, seed=seed))
        for x in captured:
            x.fill_(7)
        graph.replay()
        wanted = everything(p)
        assert all(torch.equal(x, y) for x, y in zip(captured, wanted, strict=True))
        assert not torch.equal(captured[0], first[0])


def test_launches() -> None:
    """By the design: a kernel and a sum with the gradient, one kernel for pseudo labels."""
    p = problem(1000)
    for name, most in (("teacher", 2), ("student hard, one pass", 2), ("pseudo", 1)):
        names = launched(lambda name=name: LOSSES[name](p.logits, p.arguments))  # type: ignore[misc]
        assert len(names) <= most, names
    with losses.use("reference"):
        assert len(launched(lambda: LOSSES["teacher"](p.logits, p.arguments))) > 30


def test_two_streams_are_independent() -> None:
    problems = [problem(1000, seed=seed) for seed in (1, 2)]
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


@pytest.mark.parametrize("classes", [1000, 8192, 21841, 21848])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_are_equal(classes: int, dtype: torch.dtype) -> None:
    p = problem(classes, dtype)
    first, second = everything(p), everything(p)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_autocast_changes_nothing_inside() -> None:
    p = problem(1000)
    wanted = everything(p)
    with torch.autocast("cuda", torch.bfloat16):
        got = everything(p)
        head = nn.Linear(32, 10, device="cuda")
        logits = head(torch.randn(8, 32, device="cuda"))
        loss = losses.smoothed_ce(logits, torch.arange(8, device="cuda")).loss
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max().item() > 0


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_grad_scaler_steps_and_skips(poisoned: bool) -> None:
    head = nn.Linear(16, 10, device="cuda")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    images = torch.randn(8, 16, device="cuda")
    if poisoned:
        images[-1, 0] = torch.inf
    before = head.weight.detach().clone()
    with torch.autocast("cuda", torch.float16):
        logits = head(images)
    loss = losses.student_loss(logits, torch.arange(8, device="cuda"), label_smoothing=0.1)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before) == poisoned
    assert scaler.get_scale() == (2.0**9 if poisoned else 2.0**10)


def test_compiled_as_one_graph() -> None:
    p = problem(1000)

    def step(logits: Tensor) -> Tensor:
        return losses.smoothed_ce(logits[:6], p.arguments.label[:6], label_smoothing=0.1).loss

    compiled, leaf = torch.compile(step, fullgraph=True), p.logits.requires_grad_()
    # The sums of a few rows may be added up in another order.
    assert compiled(leaf).item() == pytest.approx(step(leaf).item(), rel=1e-6)
    gradients = [torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, step)]
    assert torch.equal(*gradients)
