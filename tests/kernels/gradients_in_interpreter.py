"""The teacher's gradient: whatever arrives from above, scaled, in one pass or two, or not at all.

On Triton's interpreter, in a process of its own, as `in_interpreter.py`.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import NONE
from tests.kernels.interpreted_rows import assert_gradient, labels, rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

L, U = 3, 4


OPTIONS = {"uda_weight": 2.0, "feedback": -0.3, "temperature": 0.7, "label_smoothing": 0.1}


def teacher(logits: Tensor, **options: object) -> losses.TeacherOut:
    arguments = {**OPTIONS, **options}
    unlabeled = (len(logits) - L) // 2
    return losses.teacher_loss(logits, labels(L, 10), unlabeled, **arguments)  # type: ignore[arg-type]


def teacher_and_grad(logits: Tensor, **options: object) -> tuple[losses.TeacherOut, Tensor]:
    arguments = {**OPTIONS, **options}
    return losses.teacher_loss_and_grad(logits, labels(L, 10), U, **arguments)  # type: ignore[arg-type]


def blend(out: losses.TeacherOut, upstream: tuple[float, float, float, float]) -> Tensor:
    """A loss that weighs the teacher's loss and each of its terms."""
    terms = zip(upstream, (out.loss, out.sup, out.uda, out.mpl), strict=True)
    total = sum(factor * term for factor, term in terms if factor)
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize(
    ("width", "dtype"), [(10, torch.float32), (100, torch.float16), (9000, torch.float32)]
)
@pytest.mark.parametrize(
    "upstream",
    [
        (3.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, -2.0),
        (0.0, 0.5, 0.0, 1.0),
        (1.5, -1.0, 0.25, 4.0),
    ],
)
def test_any_term_may_be_differentiated(
    upstream: tuple[float, float, float, float], width: int, dtype: torch.dtype
) -> None:
    logits = rows(L + 2 * U, width, dtype).requires_grad_()
    oracle = logits.detach().double().requires_grad_()
    with losses.use("triton"):
        (gradient,) = torch.autograd.grad(blend(teacher(logits), upstream), logits)
    (wanted,) = torch.autograd.grad(blend(teacher(oracle), upstream), oracle)
    assert gradient.dtype == dtype
    assert_gradient(gradient, wanted)


def test_only_the_terms_carry_a_gradient() -> None:
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        out = teacher(logits)
        silent, gradient = teacher_and_grad(logits)
        with torch.no_grad():
            quiet = teacher(logits)
    carries = {name for name, x in out._asdict().items() if x.requires_grad}
    assert carries == {"loss", "sup", "uda", "mpl"}
    for a, b, c in zip(out, silent, quiet, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert not b.requires_grad and not c.requires_grad
    assert not gradient.requires_grad


def test_weights_are_constants() -> None:
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    weight, feedback = torch.tensor(2.0, requires_grad=True), torch.tensor(-0.3, requires_grad=True)
    with losses.use("triton"):
        teacher(logits, uda_weight=weight, feedback=feedback).loss.backward()
        _, numbers = teacher_and_grad(logits)
    assert weight.grad is None and feedback.grad is None
    assert logits.grad is not None and torch.equal(logits.grad, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 1025, 8193])
def test_one_pass_equals_two(classes: int, dtype: torch.dtype) -> None:
    logits = rows(L + 2 * U, classes, dtype, 7).requires_grad_()
    options = {"num_classes": classes, "threshold": 0.4, "truth": labels(U, classes)}
    with losses.use("triton"):
        out = teacher(logits, **options)
        once, gradient = teacher_and_grad(logits.detach(), **options)
    (again,) = torch.autograd.grad(out.loss, logits)
    assert all(torch.equal(a, b) for a, b in zip(out, once, strict=True))
    assert torch.equal(again, gradient)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**-20])
def test_grad_scale_multiplies_before_rounding(scale: float) -> None:
    logits = rows(L + 2 * U, 100, torch.float16)
    oracle = logits.double().requires_grad_()
    with losses.use("triton"):
        out, gradient = teacher_and_grad(logits, grad_scale=torch.tensor(scale))
    expected = teacher(oracle)
    (wanted,) = torch.autograd.grad(expected.loss * scale, oracle)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)  # the value is not
    assert_gradient(gradient, wanted)


def test_float16_gradients_of_a_large_batch_survive_under_a_loss_scale() -> None:
    """One row of 4096, whose gradient is below all float16 numbers: scaled, none is lost."""
    logits = rows(L + 2 * U, 1000, torch.float16).requires_grad_()
    weights = {"uda_weight": 2.0**-24, "feedback": 2.0**-24}
    scale = torch.tensor(2.0**20)
    with losses.use("triton"):
        loss = teacher(logits, **weights).loss
        _, folded = teacher_and_grad(logits, grad_scale=scale, **weights)
    (lost,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (kept,) = torch.autograd.grad(loss * scale, logits)
    strong = slice(L + U, None)
    assert lost[strong].abs().max().item() == 0.0
    assert kept[strong].abs().amax(-1).min().item() > 1e-3
    assert torch.equal(kept, folded)


def test_what_is_left_of_p_minus_one_survives_rounding() -> None:
    """p rounds to 1 in float16, and p - 1 does not to 0."""
    logits = torch.zeros(1, 10, dtype=torch.float16)
    logits[0, 3] = 11.0
    logits.requires_grad_()
    with losses.use("triton"):
        loss = losses.smoothed_ce(logits, torch.tensor([3])).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 3].item() == pytest.approx(-9.0 / (9.0 + math.exp(11.0)), rel=2e-3)


def test_the_loss_is_not_to_be_changed_in_place() -> None:
    """It is a view of all statistics; PyTorch notices."""
    with losses.use("triton"):
        out = teacher(rows(L + 2 * U, 10, torch.float32).requires_grad_())
    with pytest.raises(RuntimeError, match="modified inplace"):
        out.loss.div_(2.0)


def test_backward_twice_gives_the_same_twice() -> None:
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        loss = teacher(logits).loss
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2.0 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_logits_that_change_before_the_backward_pass_are_noticed() -> None:
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        loss = teacher(x := logits * 1.0).loss
    x += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN and the largest integers, not the zeros that a fresh process gets."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [12, 9000])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_element_is_written(width: int) -> None:
    classes = width - 2
    logits = rows(L + 2 * U, classes, torch.float32, 2).requires_grad_()
    oracle = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(teacher(oracle, num_classes=classes).loss, oracle)
    with losses.use("triton"):
        out = teacher(logits, num_classes=classes)
        _, once = teacher_and_grad(logits, num_classes=classes)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert all(x.isfinite() for x in out[:-1])
    assert 0 <= out.label.min().item() <= out.label.max().item() < classes
    assert torch.equal(gradient, once)
    assert_gradient(gradient, wanted)
    assert gradient[:, classes:].abs().max().item() == 0.0
    assert gradient[L : L + U].abs().max().item() == 0.0


@pytest.mark.parametrize("width", [10, 9000])
@pytest.mark.parametrize("row", ["weak", "strong"])
def test_nan_survives_the_mask(width: int, row: str) -> None:
    """A step on broken logits must not look like one: GradScaler skips it by its NaN."""
    logits = rows(2, width, torch.float32)
    logits[("weak", "strong").index(row), 3] = math.nan
    logits.requires_grad_()
    with losses.use("triton"):
        out = losses.teacher_loss(
            logits, NONE, 1, uda_weight=1.0, feedback=0.0, threshold=2.0, pseudo=torch.tensor([1])
        )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert out.uda.isnan() and out.loss.isnan()
    assert gradient[1].isnan().any()
    assert out.mask_rate.item() == 0.0


def test_all_rows_ignored_give_zeros() -> None:
    logits = rows(3, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        out = losses.smoothed_ce(logits, torch.full((3,), -100), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(out.loss * math.inf, logits)
    assert out.loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(3, 10))


def test_nothing_passes_a_threshold_above_one_and_no_weight_moves_nothing() -> None:
    logits = rows(L + 2 * U, 10, torch.float32)
    with losses.use("triton"):
        out, alone = teacher_and_grad(logits, threshold=1.5, feedback=0.0)
        _, none = teacher_and_grad(logits, uda_weight=0.0, feedback=0.0)
    assert out.uda.item() == out.mask_rate.item() == 0.0 < out.confidence.item()
    for gradient in (alone, none):
        assert gradient[L:].abs().max().item() == 0.0 < gradient[:L].abs().max().item()


finite = st.floats(-20, 20, width=32)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(finite, min_size=4, max_size=4), min_size=L, max_size=L + 6),
    st.sampled_from([0.0, 0.5, -1.0, 1024.0]),
    st.permutations(range(4)),
)
def test_rows_of_the_gradient_add_up_to_zero_and_order_does_not_matter(
    numbers: list[list[float]], shift: float, order: list[int]
) -> None:
    base = torch.tensor(numbers).div(2**-8).round().mul(2**-8)  # a shift loses no bits
    base = base[: L + (len(base) - L) // 2 * 2]
    unlabeled = (len(base) - L) // 2
    where = torch.tensor([order.index(i) for i in range(4)])

    def run(x: Tensor, target: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        out, gradient = losses.teacher_loss_and_grad(
            x, target, unlabeled, uda_weight=2.0, feedback=0.3, temperature=0.5, pseudo=pseudo
        )
        return out.loss, gradient

    target, pseudo = labels(L, 4), labels(unlabeled, 4)
    with losses.use("triton"):
        loss, gradient = run(base, target, pseudo)
        shifted = run(base + shift, target, pseudo)
        turned = run(base[:, order], where[target], where[pseudo])
    assert gradient.sum(-1).abs().max().item() < 1e-6
    assert torch.equal(shifted[0], loss) and torch.equal(shifted[1], gradient)
    torch.testing.assert_close(turned[0], loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned[1], gradient[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [10, 9000])
def test_huge_logits_do_not_overflow(width: int) -> None:
    logits = torch.zeros(L + 2 * U, width)
    for row, column in itertools.product(range(L + 2 * U), range(0, 8, 2)):
        logits[row, column] = 3e38 if (row + column) % 3 else -3e38
    logits.requires_grad_()
    options = {"uda_weight": 0.5, "feedback": 0.5, "label_smoothing": 0.0}
    with losses.use("triton"):
        out = teacher(logits, **options)
    expected = teacher(logits, **options)
    for name in ("sup", "uda", "mpl", "confidence", "entropy"):
        assert getattr(out, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.isfinite().all()


class Silent(torch.autograd.Function):
    """Passes a number on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


def every_loss(logits: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Each loss of 11 rows, and all of its terms that have a gradient."""
    target = labels(len(logits), 10)
    return {
        "teacher": teacher(logits)[:4],
        "smoothed_ce": losses.smoothed_ce(logits, target)[:1],
        "hard student": losses.student_loss(logits, target)[:1],
        "soft student": losses.student_loss(logits, logits.detach())[:1],
        "cosine": losses.cosine_loss(logits, target)[:1],
        "exact": (losses.exact_feedback(logits, logits.detach(), weight=1.0),),
    }


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_gradient_may_arrive(backend: Literal["triton", "reference"]) -> None:
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    with losses.use(backend):
        found = every_loss(logits)
    for name, terms in found.items():
        for term in terms:
            (gradient,) = torch.autograd.grad(
                Silent.apply(term), logits, retain_graph=True, allow_unused=True
            )
            assert gradient is None or not gradient.any(), name
        # One that is silent leaves the others as they are.
        total = torch.stack([Silent.apply(terms[0]), *terms[1:], terms[-1]]).sum()
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(sum(terms[1:], terms[-1]), logits)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)


def test_float64_numbers_are_the_float32_ones() -> None:
    """Inductor keeps a number of Python as a 0-dim float64."""
    logits = rows(L + 2 * U, 10, torch.float32).requires_grad_()
    target = labels(len(logits), 10)
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b, scale = (torch.tensor(x, dtype=dtype) for x in (0.7, -0.3, 3.1))
        weights = {"uda_weight": a, "feedback": b}
        with losses.use("triton"):
            out = teacher(logits, **weights)
            once = teacher_and_grad(logits, grad_scale=scale, **weights)
            hard = losses.student_loss_and_grad(logits, target, grad_scale=scale)
            soft = losses.student_loss_and_grad(logits, logits, grad_scale=scale)
            exact = losses.exact_feedback(logits, logits.detach(), weight=a)
        gradients = torch.autograd.grad((out.loss, exact), logits)
        found.append([*out, *once[0], once[1], *hard[0], hard[1], *soft[0], soft[1], exact])
        found[-1].extend(gradients)
    assert all(x.dtype == y.dtype for x, y in zip(*found, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
