"""torch.compile and torch.library on the fused losses: one graph, no break, any batch size.

On Triton's interpreter, in a process of its own, as `in_interpreter.py`: an op is one opaque call
there, where on a GPU its kernel is traced.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mpl_fast import losses
from mpl_fast.kernels import teacher_op
from tests.kernels.interpreted_rows import labels, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Loss = Callable[..., tuple[Tensor, ...]]
CLASSES, WIDTH = 10, 16
SCALAR = torch.tensor(0.5)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with losses.use("triton"):
        yield
    torch.compiler.reset()


def request(labeled: int, unlabeled: int) -> teacher_op.Request:
    return teacher_op.Request(
        target=labels(labeled, CLASSES),
        given=labels(unlabeled, CLASSES),
        truth=labels(unlabeled, CLASSES),
        uda_weight=SCALAR,
        feedback=SCALAR,
        has_given=True,
        has_truth=True,
        from_strong=False,
        n_unlabeled=unlabeled,
        ignore_index=-100,
        num_classes=CLASSES,
        temperature=0.7,
        threshold=0.2,
        label_smoothing=0.1,
    )


@pytest.mark.parametrize(("labeled", "unlabeled"), [(3, 4), (3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("mode", ["statistics", "both", "gradient"])
def test_the_op_keeps_its_promises(labeled: int, unlabeled: int, mode: str) -> None:
    """Schema, shapes of its fake, no hidden mutation or alias, dynamic shapes."""
    x = rows(labeled + 2 * unlabeled, CLASSES, torch.float32, WIDTH - CLASSES)
    asked = request(labeled, unlabeled)
    _, _, saved, _ = teacher_op.teacher(x, *asked, x, [], True, False)
    modes = {
        "statistics": (x, [], True, False),
        "both": (x, [SCALAR], True, True),
        "gradient": (saved, [SCALAR] * 4, False, True),
    }
    results = torch.library.opcheck(torch.ops.mpl_fast.teacher.default, (x, *asked, *modes[mode]))
    assert set(results.values()) == {"SUCCESS"}


def whole(logits: Tensor) -> tuple[Tensor, ...]:
    """3 labeled rows and pairs; every term gets another gradient."""
    unlabeled = (logits.shape[0] - 3) // 2
    out = losses.teacher_loss(
        logits,
        labels(3, CLASSES),
        unlabeled,
        uda_weight=SCALAR,
        feedback=-0.25,
        temperature=0.7,
        threshold=0.2,
        label_smoothing=0.1,
        truth=torch.zeros(unlabeled, dtype=torch.int64),
        num_classes=CLASSES,
    )
    return 2.0 * out.loss + 0.5 * out.uda - out.mpl, *out[4:]


def plain(logits: Tensor) -> tuple[Tensor, ...]:
    """The loss alone; whatever has a label is labeled by the strong row."""
    unlabeled = logits.shape[0] // 2
    out = losses.teacher_loss(
        logits,
        logits.new_empty(0, dtype=torch.int64),
        unlabeled,
        uda_weight=1.0,
        feedback=SCALAR,
        pseudo="strong",
        num_classes=CLASSES,
    )
    return out.loss, out.label


def one_pass(logits: Tensor) -> tuple[Tensor, ...]:
    """No autograd inside: the gradient is a number as any other."""
    unlabeled = (logits.shape[0] - 3) // 2
    out, gradient = losses.teacher_loss_and_grad(
        logits,
        labels(3, CLASSES),
        unlabeled,
        uda_weight=SCALAR,
        feedback=SCALAR,
        num_classes=CLASSES,
        grad_scale=SCALAR,
    )
    return (logits * gradient.detach()).sum(), out.loss, out.label


def labeled(logits: Tensor) -> tuple[Tensor, ...]:
    target = torch.arange(logits.shape[0], device=logits.device) % CLASSES
    out = losses.smoothed_ce(logits, target, label_smoothing=0.1, num_classes=CLASSES)
    return out.loss * 3.0, out.accuracy


def run(loss: Loss, logits: Tensor, *rest: object) -> tuple[tuple[Tensor, ...], Tensor]:
    x = logits.clone().requires_grad_()
    out = loss(x, *rest)
    return out, torch.autograd.grad(out[0], x)[0]


@pytest.mark.parametrize(
    ("loss", "backend"),
    [
        (whole, "eager"),
        (whole, "aot_eager"),
        (whole, "inductor"),
        (plain, "aot_eager"),
        (one_pass, "aot_eager"),
        (labeled, "aot_eager"),
    ],
)
def test_one_graph_serves_every_batch_size(loss: Loss, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for pairs in (4, 5, 9):
        logits = rows((0 if loss is plain else 3) + 2 * pairs, CLASSES, torch.float32, 6)
        if loss is one_pass:  # multiplies by all columns
            logits = logits.nan_to_num()
        got, gradient = run(compiled, logits)
        expected, wanted = run(loss, logits)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)
        assert not any(x.requires_grad for x in got[1:])
        compilations.append(counter.frame_count)
    # The first may start over, to take in a float; no other batch size makes it compile again.
    assert 1 <= compilations[0] == compilations[-1]


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("loss", [plain, labeled])
def test_a_batch_may_be_empty(loss: Loss, count: int) -> None:
    logits = rows(2 * count, CLASSES, torch.float32, 6)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, gradient = run(compiled, logits)
    expected, wanted = run(loss, logits)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(gradient, wanted)
    assert gradient.shape == logits.shape


def test_compiled_without_gradients() -> None:
    logits = rows(11, CLASSES, torch.float32, 6)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = compiled(logits), whole(logits)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_two_derivatives_are_refused_when_compiled() -> None:
    logits = rows(11, CLASSES, torch.float32, 6).requires_grad_()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(logits)[0], logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def numbers(logits: Tensor, weight: float, feedback: float, scale: Tensor) -> tuple[Tensor, ...]:
    """What Python's numbers become in a graph that is not compiled anew for each of them."""
    out = losses.teacher_loss(logits, labels(3, 10), 4, uda_weight=weight, feedback=feedback)
    constant = logits.detach()
    taught, gradient = losses.student_loss_and_grad(
        constant, labels(11, 10), grad_scale=scale * weight
    )
    exact = losses.exact_feedback(logits, constant, weight=feedback)
    return out.loss + exact, out.uda.detach(), taught.loss, gradient


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_numbers_that_change_are_no_new_graph(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(numbers, fullgraph=True, dynamic=True, backend=counter)
    logits = rows(11, 10, torch.float32)
    compilations = []
    for weight, feedback in [(0.7, -0.3), (8.1, 0.15), (1.0, 0.0), (2.5, -1e-3)]:
        scale = torch.tensor(3.1, dtype=torch.float64)
        rest = weight, feedback, scale
        got, wanted = (run(f, logits, *rest) for f in (compiled, numbers))
        for a, b in zip((*got[0], got[1]), (*wanted[0], wanted[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        compilations.append(counter.frame_count)
    assert compilations[-1] <= 2  # the first may take numbers for constants
