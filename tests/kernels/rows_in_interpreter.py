"""The kernels of single rows against the float64 reference, on Triton's interpreter.

Not collected by itself: Triton reads TRITON_INTERPRET when a kernel is decorated, so this needs a
process of its own. `test_triton.py` starts it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mpl_fast.kernels import reference
from mpl_fast.kernels.fused_rows import cosine_loss, exact_feedback, pseudo_labels
from tests.kernels.interpreted_rows import (
    CLASSES,
    KINDS,
    assert_gradient,
    assert_value,
    labels,
    rows,
)

pytestmark = [
    # inf * 0 and the like are meant; the interpreter runs on numpy, which remarks on them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FLOAT = torch.float32
# In one block, and in a loop.
WIDTHS = [6, 9000]
POISON = pytest.mark.parametrize(
    "poison", [math.nan, -math.inf, math.inf], ids=["nan", "minus_inf", "plus_inf"]
)


def poisoned(width: int, poison: float, everywhere: bool) -> Tensor:
    """A row with one such number, or of nothing else."""
    row = rows(1, width, FLOAT)
    columns = slice(1, 2)
    if everywhere:  # of NaN every other one: the interpreter finds no maximum among NaN alone
        columns = slice(None, None, 2 if math.isnan(poison) else None)
    row[0, columns] = poison
    return row


def derivative(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """A value, and the gradient of three times it: that follows what comes from above."""
    x = logits.detach().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(3.0 * value, x)
    return value.detach(), gradient


def compare_opinions(weak: Tensor, temperature: float, num_classes: int | None) -> None:
    got = pseudo_labels(weak, temperature=temperature, num_classes=num_classes)
    wanted = reference.pseudo_labels(
        weak.double(), temperature=temperature, num_classes=num_classes
    )
    assert got.label.tolist() == wanted.label.tolist()
    torch.testing.assert_close(got.confidence, wanted.confidence, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy, wanted.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("classes", "dtype"), KINDS)
@pytest.mark.parametrize(("temperature", "padding"), [(1.0, 0), (0.4, 3), (2.0, 8)])
def test_pseudo_labels(classes: int, dtype: torch.dtype, temperature: float, padding: int) -> None:
    compare_opinions(rows(3, classes, dtype, padding), temperature, classes)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("temperature", "padding"), [(1.0, 0), (3.0, 5)])
def test_labels_are_drawn_as_in_float64(classes: int, temperature: float, padding: int) -> None:
    weak = rows(12, classes, FLOAT, padding)
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(classes))
    got = pseudo_labels(weak, temperature=temperature, uniforms=uniforms, num_classes=classes)
    wanted = reference.pseudo_labels(
        weak.double(), temperature=temperature, uniforms=uniforms.double(), num_classes=classes
    )
    steps = (weak[:, :classes].double() / temperature).softmax(-1).cumsum(-1)
    border = (steps - uniforms[:, None].double()).abs().amin(-1)
    clear = border > 1e-6  # rounding decides the others
    assert clear.sum() >= 6
    assert got.label[clear].tolist() == wanted.label[clear].tolist()
    for row in range(12):  # and no further than to a neighbor
        above = steps[row, got.label[row]].item()
        below = 0.0 if got.label[row] == 0 else steps[row, got.label[row] - 1].item()
        assert below - 1e-6 <= uniforms[row].item() <= above + 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_draws_at_both_ends_hit_possible_classes(width: int) -> None:
    weak = torch.full((5, width), -math.inf)
    weak[:, [2, width - 3]] = 1.0
    uniforms = torch.tensor([0.0, 0.4999999, 0.5, 1.0 - 2.0**-24, 1.0])
    got = pseudo_labels(weak, uniforms=uniforms)
    assert got.label.tolist() == [2, 2, width - 3, width - 3, width - 3]
    assert got.confidence.tolist() == [0.5] * 5


@pytest.mark.parametrize("width", [100, 9000])
def test_draws_follow_the_probabilities(width: int) -> None:
    weak = torch.zeros(1, width).expand(9, width)
    uniforms = (torch.arange(9) + 0.5) / 9
    got = pseudo_labels(weak, uniforms=uniforms).label
    torch.testing.assert_close(got, (uniforms.double() * width).long(), rtol=0, atol=1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("drawn", [False, True])
@POISON
@pytest.mark.parametrize("everywhere", [False, True])
def test_opinions_of_infinities_and_nan(
    width: int, drawn: bool, poison: float, everywhere: bool
) -> None:
    weak = poisoned(width, poison, everywhere)
    uniforms = torch.tensor([0.7]) if drawn else None
    got = pseudo_labels(weak, uniforms=uniforms, num_classes=width - 1)
    wanted = reference.pseudo_labels(weak, uniforms=uniforms, num_classes=width - 1)
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert 0 <= got.label.item() < width - 1  # an index past the row would be a stray read


@pytest.mark.parametrize("width", WIDTHS)
def test_ties_and_tiny_temperatures(width: int) -> None:
    weak = torch.zeros(1, width)
    weak[0, [3, width - 2]] = 2.0
    assert pseudo_labels(weak).label.tolist() == [3]
    for temperature in (1e-8, 1e-38):
        got = pseudo_labels(weak, temperature=temperature)
        assert got.confidence.tolist() == [0.5]
        assert got.entropy.item() == pytest.approx(math.log(2))
        assert pseudo_labels(weak - 1e4, temperature=temperature).label.tolist() == [3]


def test_strided_rows_are_read_where_they_lie() -> None:
    wide = rows(4, 24, FLOAT)
    for view in (wide[:, 3:13], wide[:, ::4], wide[:, :5].T):
        assert not view.is_contiguous()
        compare_opinions(view, 1.0, None)
        other = rows(len(view), view.shape[1], FLOAT)
        compare_cosine(view, other)
        compare_cosine(other, view)
        compare_exact(view, other, weight=0.5)
        compare_exact(other, view, weight=0.5)
    uniforms = torch.tensor([[0.1, 9.0], [0.9, 9.0]])[:, 0]
    weak = rows(2, 10, FLOAT)
    near = pseudo_labels(weak, uniforms=uniforms.contiguous())
    assert pseudo_labels(weak, uniforms=uniforms).label.tolist() == near.label.tolist()


def compare_cosine(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    """Checks loss, mask rate and gradient against float64; returns the gradient."""
    x, oracle = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    got = cosine_loss(x, target, **options)  # type: ignore[arg-type]
    wanted = reference.cosine_loss(oracle, target, **options)  # type: ignore[arg-type]
    assert_value(got.loss, wanted.loss)
    assert_value(got.mask_rate, wanted.mask_rate)
    (gradient,) = torch.autograd.grad(3.0 * got.loss, x)
    assert_gradient(gradient, *torch.autograd.grad(3.0 * wanted.loss, oracle))
    return gradient


@pytest.mark.parametrize(("classes", "dtype"), KINDS)
@pytest.mark.parametrize(("soft", "padding"), [(False, 0), (False, 3), (True, 0), (True, 8)])
def test_cosine_loss(classes: int, dtype: torch.dtype, soft: bool, padding: int) -> None:
    logits = rows(3, classes, dtype, padding)
    target = rows(4, classes, dtype, padding)[1:] if soft else labels(3, classes)
    gradient = compare_cosine(logits, target, temperature=0.5, threshold=0.8, num_classes=classes)
    assert (gradient[:, classes:] == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_cosine_of_equals_and_of_strangers(width: int) -> None:
    logits = rows(3, width, FLOAT)
    assert cosine_loss(logits, logits.clone()).loss.item() == pytest.approx(0.0, abs=1e-7)
    far = torch.zeros(1, width)
    far[0, 0] = 200.0
    assert cosine_loss(far, torch.tensor([width - 1])).loss.item() == 1.0


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 10])
def test_cosine_threshold_is_met_by_equality(classes: int) -> None:
    target = torch.zeros(1, classes)
    for threshold, rate in ((1 / classes, 1.0), (1 / classes + 1e-6, 0.0)):
        out = cosine_loss(torch.ones(1, classes), target, threshold=threshold)
        assert out.mask_rate.item() == rate


@pytest.mark.parametrize("soft", [False, True])
def test_cosine_threshold_above_one_masks_all(soft: bool) -> None:
    target = rows(3, 10, FLOAT).flip(0) if soft else labels(3, 10)
    gradient = compare_cosine(rows(3, 10, FLOAT), target, threshold=1.5)
    assert (gradient == 0).all()
    assert (compare_cosine(rows(3, 10, FLOAT), target) != 0).any()


@pytest.mark.parametrize("width", WIDTHS)
@POISON
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("whose", ["logits", "target"])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_cosine_of_infinities_and_nan(
    width: int, poison: float, everywhere: bool, whose: str, threshold: float
) -> None:
    bad, good = poisoned(width, poison, everywhere), rows(2, width, FLOAT)[1:]
    logits, target = (bad, good) if whose == "logits" else (good, bad)
    for q in (target, torch.tensor([1]), torch.tensor([2]))[: 3 if whose == "logits" else 1]:
        got = cosine_loss(logits, q, threshold=threshold)
        wanted = reference.cosine_loss(logits.double(), q, threshold=threshold)
        assert_value(got.loss, wanted.loss)
        assert_value(got.mask_rate, wanted.mask_rate)
        _, gradient = derivative(lambda x, q=q: cosine_loss(x, q).loss, logits)  # type: ignore[misc]
        assert gradient.isfinite().all() == wanted.loss.isfinite()


@pytest.mark.parametrize("bad", [-1, 10, 1 << 40, -100])
def test_cosine_with_labels_out_of_range_is_nan(bad: int) -> None:
    logits = rows(2, 10, FLOAT)
    target = torch.tensor([3, bad])
    out = cosine_loss(logits, target)
    assert out.loss.isnan()
    assert out.mask_rate.item() == 1.0
    _, gradient = derivative(lambda x: cosine_loss(x, target).loss, logits)
    assert gradient.isnan().any(1).tolist() == [False, True]


def compare_exact(
    logits: Tensor,
    direction: Tensor,
    *,
    weight: float | Tensor,
    temperature: float = 1.0,
    num_classes: int | None = None,
) -> Tensor:
    """Checks value and gradient against float64; returns the gradient."""

    options = {"weight": weight, "temperature": temperature, "num_classes": num_classes}
    value, gradient = derivative(
        lambda x: exact_feedback(x, direction, **options),  # type: ignore[arg-type]
        logits,
    )
    wanted, oracle = derivative(
        lambda x: reference.exact_feedback(x, direction, **options),  # type: ignore[arg-type]
        logits.double(),
    )
    assert_value(value, wanted)
    assert_gradient(gradient, oracle)
    return gradient


@pytest.mark.parametrize(("classes", "dtype"), KINDS)
@pytest.mark.parametrize(("temperature", "padding"), [(1.0, 0), (0.5, 3), (2.0, 8)])
def test_exact_feedback(classes: int, dtype: torch.dtype, temperature: float, padding: int) -> None:
    gradient = compare_exact(
        rows(3, classes, dtype, padding),
        rows(4, classes, FLOAT, padding)[1:] * 0.1,
        weight=torch.tensor(-0.7) if padding else 0.3,
        temperature=temperature,
        num_classes=classes,
    )
    assert (gradient[:, classes:] == 0).all()
    assert (gradient != 0).any()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_direction_equal_for_all_classes_moves_nothing(width: int) -> None:
    logits, direction = rows(2, width, FLOAT), torch.full((2, width), 2.0)
    assert exact_feedback(logits, direction, weight=0.5).item() == pytest.approx(1.0, rel=1e-6)
    _, gradient = derivative(lambda x: exact_feedback(x, direction, weight=0.5), logits)
    assert gradient.abs().max().item() < 1e-6


@pytest.mark.parametrize("width", WIDTHS)
@POISON
@pytest.mark.parametrize("everywhere", [False, True])
def test_exact_feedback_of_infinities_and_nan(width: int, poison: float, everywhere: bool) -> None:
    bad, good = poisoned(width, poison, everywhere), rows(2, width, FLOAT)[1:]
    for logits, direction in ((bad, good), (good, bad)):
        got = exact_feedback(logits, direction, weight=1.0)
        wanted = reference.exact_feedback(logits.double(), direction, weight=1.0)
        assert_value(got, wanted)


@pytest.mark.parametrize("temperature", [1e-8, 1e-38])
def test_tiny_temperatures_saturate(temperature: float) -> None:
    logits, direction = rows(2, 9000, FLOAT), rows(3, 9000, FLOAT)[1:]
    top = logits.argmax(-1)
    got = exact_feedback(logits, direction, weight=1.0, temperature=temperature)
    assert got.item() == pytest.approx(direction.gather(1, top[:, None]).mean().item(), rel=1e-6)
    soft = cosine_loss(logits, direction, temperature=temperature).loss
    hard = cosine_loss(logits, direction.argmax(-1)).loss
    assert soft.item() == pytest.approx(hard.item(), rel=1e-6)


def test_no_rows_give_zero() -> None:
    none = torch.empty(0, 10, requires_grad=True)
    assert [len(part) for part in pseudo_labels(none)] == [0, 0, 0]
    assert len(pseudo_labels(none, uniforms=torch.empty(0)).label) == 0
    for target in (labels(0, 10), none.detach()):
        out = cosine_loss(none, target)
        assert out.loss.item() == out.mask_rate.item() == 0.0
    value = exact_feedback(none, none.detach(), weight=1.0)
    assert value.item() == 0.0
    (out.loss + value).backward()
    assert none.grad is not None
    assert none.grad.shape == (0, 10)


def test_row_offsets_do_not_overflow() -> None:
    """Rows 2**30 elements apart: the third starts past 2**31."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16)  # only touched pages are real
    far = memory.as_strided((3, 16), (pitch, 1))
    far.copy_(rows(3, 16, torch.bfloat16))
    near, target = far.contiguous(), far.flip(0)
    assert pseudo_labels(far).label.tolist() == near.argmax(-1).tolist()
    assert cosine_loss(near.flip(0), far).loss.item() == cosine_loss(near.flip(0), near).loss.item()
    assert cosine_loss(far, target).loss.item() == cosine_loss(near, target).loss.item()
    value = exact_feedback(far, near, weight=1.0)
    assert value.item() == exact_feedback(near, far, weight=1.0).item()
    assert value.item() == exact_feedback(near, near, weight=1.0).item()


def test_what_carries_a_gradient() -> None:
    logits = rows(2, 10, FLOAT).requires_grad_()
    other = rows(3, 10, FLOAT)[1:].requires_grad_()
    out = cosine_loss(logits, other)
    assert out.loss.requires_grad
    assert not out.mask_rate.requires_grad
    assert not any(part.requires_grad for part in pseudo_labels(logits))
    weight = torch.tensor(2.0, requires_grad=True)
    (out.loss + exact_feedback(logits, other, weight=weight)).backward()
    assert logits.grad is not None
    assert other.grad is None is weight.grad
    assert not cosine_loss(logits.detach(), other).loss.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cosine_loss(x, labels(2, 10)).loss,
        lambda x: cosine_loss(x, x.detach()).loss,
        lambda x: exact_feedback(x, x.detach(), weight=1.0),
    ],
    ids=["cosine_hard", "cosine_soft", "exact"],
)
def test_two_derivatives_are_refused(loss: Callable[[Tensor], Tensor]) -> None:
    logits = rows(2, 10, FLOAT).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(logits), logits, create_graph=True)


X, ONE = rows(3, 10, FLOAT), torch.ones(())
OPS = torch.ops.mpl_fast


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.pseudo_labels, (X, X, False, 0.7, 10)),
        (OPS.pseudo_labels, (X, torch.rand(3), True, 0.7, 9)),
        (OPS.cosine, (X, labels(3, 10), 1.0, 0.5, 10)),
        (OPS.cosine, (X, X.flip(0), 0.7, 0.5, 9)),
        (OPS.cosine_gradient, (X, labels(3, 10), torch.rand(4, 3), ONE, 1.0, 10)),
        (OPS.cosine_gradient, (X, X.flip(0), torch.rand(4, 3), ONE, 0.7, 9)),
        (OPS.exact, (X, X.flip(0), ONE, 0.7, 9)),
        (OPS.exact_gradient, (X, X.flip(0), ONE, torch.rand(3, 3), ONE, 0.7, 9)),
    ],
)
def test_the_ops_are_what_they_say(op: object, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(op.default, arguments)  # type: ignore[attr-defined]


def pseudo_step(x: Tensor, other: Tensor) -> Tensor:
    drawn = pseudo_labels(x, uniforms=torch.full_like(x[:, 0], 0.3))
    confidence = pseudo_labels(other, temperature=0.5).confidence
    return x.gather(1, drawn.label[:, None]).sum() + confidence.sum()


def cosine_step(x: Tensor, other: Tensor) -> Tensor:
    hard = cosine_loss(x, other.argmax(-1))
    return 2.0 * cosine_loss(x, other, temperature=0.5, threshold=0.6).loss + hard.loss


def exact_step(x: Tensor, other: Tensor) -> Tensor:
    return 2.0 * exact_feedback(x, other, weight=other.mean())


@pytest.mark.parametrize("step", [pseudo_step, cosine_step, exact_step])
def test_compiles_into_one_graph_for_every_batch(
    step: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """No break, nothing compiled for another batch, and the same numbers as without."""
    counter = CompileCounterWithBackend("aot_eager")
    compilations = []
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for count in (3, 5, 8):
        other = rows(count + 1, 10, FLOAT)[1:]
        results = []
        for function in (step, compiled):
            x = rows(count, 10, FLOAT).requires_grad_()
            value = function(x, other)
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0
