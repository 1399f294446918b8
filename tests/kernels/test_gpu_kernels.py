"""What only a GPU can show of the fused losses: rounding, graphs, launches, streams, scaling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import losses

pytestmark = pytest.mark.gpu

LABELED, UNLABELED = 6, 40
# ImageNet; the widest row in registers; ImageNet-21k in a loop, padded and not.
ROWS = [(1000, 1000), (8192, 8192), (21841, 21848), (21841, 21841)]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of rounding


class Problem:
    """Arguments on the GPU; scalars and labels are tensors, so that a graph sees them change."""

    def __init__(self, classes: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def labels(count: int) -> Tensor:
            return torch.randint(classes, (count,), device="cuda", generator=generator)

        rows = LABELED + 2 * UNLABELED
        logits = torch.randn(rows, width, device="cuda", generator=generator) * 3.0
        self.logits = logits.to(dtype).requires_grad_()
        self.target, self.truth = labels(LABELED), labels(UNLABELED)
        self.pseudo = labels(UNLABELED)
        self.uda_weight, self.feedback = torch.rand(2, device="cuda", generator=generator).unbind()
        self.weight = torch.rand(UNLABELED, device="cuda", generator=generator)
        self.classes = classes

    def lifted(self) -> "Problem":
        """The same in float64."""
        other = Problem.__new__(Problem)
        vars(other).update(vars(self))
        other.logits = self.logits.detach().double().requires_grad_()
        return other

    def copy_from(self, other: "Problem") -> None:
        """New numbers in the same memory, as the next step of a captured graph finds them."""
        for name, mine in vars(self).items():
            if isinstance(mine, Tensor):
                mine.detach().copy_(getattr(other, name).detach())

    def teacher(self) -> losses.TeacherOut:
        return losses.teacher_loss(
            self.logits,
            self.target,
            UNLABELED,
            uda_weight=self.uda_weight,
            feedback=self.feedback,
            temperature=0.7,
            threshold=0.3,
            label_smoothing=0.1,
            pseudo=self.pseudo,
            truth=self.truth,
            num_classes=self.classes,
        )

    def teacher_and_grad(self, scale: Tensor | None = None) -> tuple[losses.TeacherOut, Tensor]:
        return losses.teacher_loss_and_grad(
            self.logits,
            self.target,
            UNLABELED,
            uda_weight=self.uda_weight,
            feedback=self.feedback,
            temperature=0.7,
            threshold=0.3,
            label_smoothing=0.1,
            pseudo=self.pseudo,
            truth=self.truth,
            num_classes=self.classes,
            grad_scale=scale,
        )

    def student(self) -> losses.StudentOut:
        return losses.student_loss(
            self.logits[: LABELED + UNLABELED],
            self.pseudo,
            self.target,
            label_smoothing=0.1,
            weight=self.weight,
            num_classes=self.classes,
        )

    def student_and_grad(self) -> tuple[losses.StudentOut, Tensor]:
        return losses.student_loss_and_grad(
            self.logits[: LABELED + UNLABELED].detach(),
            self.pseudo,
            self.target,
            label_smoothing=0.1,
            weight=self.weight,
            num_classes=self.classes,
        )

    def weak(self) -> losses.PseudoLabels:
        weak = self.logits[LABELED : LABELED + UNLABELED].detach()
        return losses.pseudo_labels(weak, temperature=0.7, num_classes=self.classes)

    def cosine(self) -> losses.CosineOut:
        strong = self.logits[LABELED + UNLABELED :]
        return losses.cosine_loss(strong, self.pseudo, num_classes=self.classes)

    def exact(self) -> Tensor:
        direction = torch.ones_like(self.logits[:UNLABELED], dtype=torch.float32)
        return losses.exact_feedback(
            self.logits[:UNLABELED], direction, weight=self.feedback, num_classes=self.classes
        )


def gradient(loss: Tensor, problem: Problem) -> Tensor:
    return torch.autograd.grad(loss, problem.logits)[0]


def everything(p: Problem) -> list[Tensor]:
    """All functions, all outputs, all gradients."""
    teacher, student, cosine = p.teacher(), p.student(), p.cosine()
    outs: list[Tensor] = [*teacher, *student, *cosine, *p.weak()]
    outs += [gradient(loss, p) for loss in (teacher.loss, student.loss, cosine.loss, p.exact())]
    for out, one_pass in (p.teacher_and_grad(), p.student_and_grad()):
        outs += [*out, one_pass]
    return [x.detach() for x in outs]


def launched(work: Callable[[], object]) -> list[str]:
    """Names of what `work` puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    work()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.events() or ()
    return [event.name for event in events if event.device_type.name == "CUDA"]


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("classes", "width"), ROWS)
@pytest.mark.parametrize("mode", ["one pass", "recompute"])
def test_gradients_are_off_by_their_rounding_alone(
    classes: int, width: int, dtype: torch.dtype, mode: str
) -> None:
    p = Problem(classes, width, dtype)
    oracle = p.lifted()
    with losses.use("reference"):
        expected = oracle.teacher()
        wanted = gradient(expected.loss, oracle)
    out, got = p.teacher_and_grad() if mode == "one pass" else (p.teacher(), torch.empty(0))
    if mode == "recompute":
        got = gradient(out.loss, p)
    assert torch.equal(out.label, expected.label)
    for name in ("loss", "sup", "uda", "mpl", "mask_rate", "confidence", "entropy"):
        value, truth = getattr(out, name).item(), getattr(expected, name).item()
        assert value == pytest.approx(truth, rel=2e-6, abs=2e-6), name
    # Half a step of the type, and float32's own error where p - 1[y] cancels.
    torch.testing.assert_close(got.double(), wanted, rtol=1.02 * UNIT[dtype] + 1e-6, atol=3e-8)
    error = (got.double() - wanted).norm()
    rounding = (wanted.to(dtype).double() - wanted).norm()
    assert error <= 1.05 * rounding + 1e-6 * wanted.norm()
    assert got[:, classes:].count_nonzero() == 0


def test_nothing_waits_for_the_device() -> None:
    p = Problem(1000, 1000, torch.bfloat16)
    scale = torch.tensor(1024.0, device="cuda")
    everything(p)  # libraries synchronize when they are loaded
    p.teacher_and_grad(scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
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


@pytest.mark.parametrize(("classes", "width"), ROWS)
def test_two_runs_are_equal(classes: int, width: int) -> None:
    p = Problem(classes, width, torch.bfloat16)
    first, second = everything(p), everything(p)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_autocast_changes_nothing_inside() -> None:
    p = Problem(1000, 1000, torch.bfloat16)
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


def test_the_scale_of_a_grad_scaler_saves_small_gradients() -> None:
    p = Problem(1000, 1000, torch.float16)
    oracle = p.lifted()
    with losses.use("reference"):
        wanted = gradient(oracle.teacher().loss, oracle)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    scale = scaler.scale(torch.ones((), device="cuda"))
    _, plain = p.teacher_and_grad()
    _, scaled = p.teacher_and_grad(scale)
    unscaled = scaled.double() / 2.0**14
    lost, kept = ((g.double() - wanted).norm() / wanted.norm() for g in (plain, unscaled))
    torch.testing.assert_close(unscaled, wanted, rtol=1.02 * 2**-11, atol=2**-24 / 2**14 + 3e-8)
    assert kept <= lost
    assert (plain == 0).sum() > (scaled == 0).sum()


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_grad_scaler_steps_and_skips(poisoned: bool) -> None:
    head = nn.Linear(16, 10, device="cuda")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scale = scaler.scale(torch.ones((), device="cuda"))
    images = torch.randn(8, 16, device="cuda")
    if poisoned:
        images[-1, 0] = torch.inf
    before = head.weight.detach().clone()
    with torch.autocast("cuda", torch.float16):
        logits = head(images)
    _, grad = losses.student_loss_and_grad(
        logits, torch.arange(8, device="cuda"), label_smoothing=0.1, grad_scale=scale
    )
    logits.backward(grad)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before) == poisoned
    assert scaler.get_scale() == (2.0**9 if poisoned else 2.0**10)


def test_row_offsets_do_not_overflow() -> None:
    """Rows 2**30 elements apart: the third starts past 2**31."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16, device="cuda")
    logits = memory.as_strided((3, 16), (pitch, 1))
    logits.copy_(torch.randn(3, 16))
    target = torch.arange(3, device="cuda")
    got = losses.smoothed_ce(logits, target).loss
    assert got.item() == pytest.approx(losses.smoothed_ce(logits.clone(), target).loss.item())


def test_compiled_as_one_graph() -> None:
    p = Problem(1000, 1000, torch.bfloat16)

    def step(logits: Tensor) -> Tensor:
        return losses.smoothed_ce(logits[:LABELED], p.target, label_smoothing=0.1).loss

    compiled = torch.compile(step, fullgraph=True)
    # The sums of a few rows may be added up in another order.
    assert compiled(p.logits).item() == pytest.approx(step(p.logits).item(), rel=1e-6)
    assert torch.equal(gradient(compiled(p.logits), p), gradient(step(p.logits), p))
