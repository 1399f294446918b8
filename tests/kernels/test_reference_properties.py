"""What must hold of any logits: tried on ones that hypothesis looks for."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import DOUBLE, NONE, gradient_of

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
finite = st.floats(-20, 20, width=32)
rows_of_four = st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=6)
ORDER = [2, 0, 3, 1]

# Of logits (N, 4), other logits (N, 4), and labels (N,).
LOSSES: dict[str, Loss] = {
    "smoothed_ce": lambda x, other, y: losses.smoothed_ce(x, y, label_smoothing=0.1).loss,
    "student_hard": lambda x, other, y: losses.student_loss(x, y, label_smoothing=0.1).loss,
    "student_soft": lambda x, other, y: losses.student_loss(x, other, temperature=0.5).loss,
    "teacher": lambda x, other, y: (
        losses.teacher_loss(
            torch.cat((x, other, x)),
            y,
            len(x),
            uda_weight=2.0,
            feedback=0.3,
            temperature=0.5,
            label_smoothing=0.1,
            pseudo=y,  # given: a tie would break otherwise in another order
        ).loss
    ),
    "cosine_hard": lambda x, other, y: losses.cosine_loss(x, y).loss,
    "cosine_soft": lambda x, other, y: losses.cosine_loss(x, other, temperature=0.5).loss,
    "exact": lambda x, other, y: losses.exact_feedback(x, other, weight=0.3, temperature=0.5),
}
EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def doubles(rows: list[tuple[float, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, other logits, and labels."""
    x = torch.tensor(rows, dtype=DOUBLE)
    other = x.flip(0).roll(1, -1)
    return x, other, other.argmax(-1)


def value_and_gradient(loss: Loss, x: Tensor, other: Tensor, y: Tensor) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, other, y)
    return value.item(), gradient_of(value, x)


@EVERY
@given(rows=rows_of_four, shift=finite)
def test_gradients_add_up_to_zero_and_shifts_do_not_matter(
    loss: Loss, rows: list[tuple[float, ...]], shift: float
) -> None:
    x, other, y = doubles(rows)
    value, gradient = value_and_gradient(loss, x, other, y)
    assert gradient.sum(-1).abs().max().item() < 1e-12
    shifted, _ = value_and_gradient(loss, x + shift, other, y)
    assert shifted == pytest.approx(value, rel=1e-9, abs=1e-9)


@EVERY
@given(rows=rows_of_four)
def test_the_order_of_classes_does_not_matter(loss: Loss, rows: list[tuple[float, ...]]) -> None:
    x, other, y = doubles(rows)
    value, gradient = value_and_gradient(loss, x, other, y)
    where = torch.tensor([ORDER.index(i) for i in range(4)])
    moved, moved_gradient = value_and_gradient(loss, x[:, ORDER], other[:, ORDER], where[y])
    assert moved == pytest.approx(value, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[:, ORDER])


@given(rows=rows_of_four, weight=st.floats(-8, 8, width=32), h=st.floats(-2, 2, width=32))
def test_a_number_is_a_tensor_of_it(rows: list[tuple[float, ...]], weight: float, h: float) -> None:
    x, other, _ = doubles(rows)
    both = torch.cat((other, x))
    plain = losses.teacher_loss(both, NONE, len(x), uda_weight=weight, feedback=h)
    tensor = losses.teacher_loss(
        both, NONE, len(x), uda_weight=torch.tensor(weight), feedback=torch.tensor(h)
    )
    assert plain.loss.item() == tensor.loss.item()
    exact = [losses.exact_feedback(x, other, weight=w) for w in (weight, torch.tensor(weight))]
    assert exact[0].item() == exact[1].item()


@given(rows=rows_of_four, threshold=st.floats(1.001, 1e6))
def test_above_one_nothing_passes_the_threshold(
    rows: list[tuple[float, ...]], threshold: float
) -> None:
    x, other, _ = doubles(rows)
    both = torch.cat((other, x))
    out, gradient = losses.teacher_loss_and_grad(
        both, NONE, len(x), uda_weight=8.0, feedback=0.0, threshold=threshold
    )
    assert out.uda.item() == out.mask_rate.item() == 0.0
    assert gradient.abs().max().item() == 0.0
    assert losses.cosine_loss(x, other, threshold=threshold).loss.item() == 0.0


@given(rows=rows_of_four, scale=st.sampled_from([None, 0.5, 1024.0]))
def test_one_pass_equals_the_plain_gradient(
    rows: list[tuple[float, ...]], scale: float | None
) -> None:
    x, other, y = doubles(rows)
    above = None if scale is None else torch.tensor(scale)
    factor = scale or 1.0
    leaf = torch.cat((x, other, x)).requires_grad_()
    plain = losses.teacher_loss(leaf, y, len(x), uda_weight=2.0, feedback=-0.3)
    out, gradient = losses.teacher_loss_and_grad(
        leaf, y, len(x), uda_weight=2.0, feedback=-0.3, grad_scale=above
    )
    assert out.loss.item() == plain.loss.item()
    torch.testing.assert_close(gradient, factor * gradient_of(plain.loss, leaf))
    for pseudo in (y, other):
        lesson = losses.student_loss(leaf[len(x) :], torch.cat((pseudo, pseudo)))
        _, part = losses.student_loss_and_grad(
            leaf[len(x) :], torch.cat((pseudo, pseudo)), grad_scale=above
        )
        torch.testing.assert_close(part, factor * gradient_of(lesson.loss, leaf)[len(x) :])


@given(rows=rows_of_four)
def test_no_feedback_and_no_weight_leave_unlabeled_rows_alone(
    rows: list[tuple[float, ...]],
) -> None:
    x, other, _ = doubles(rows)
    both = torch.cat((other, x))
    _, gradient = losses.teacher_loss_and_grad(both, NONE, len(x), uda_weight=0.0, feedback=0.0)
    assert gradient.abs().max().item() == 0.0


@given(rows=rows_of_four)
def test_cosine_loss_is_between_zero_and_two(rows: list[tuple[float, ...]]) -> None:
    """Of distributions it is between 0 and 1, which no negative number can stretch."""
    x, other, y = doubles(rows)
    for target in (y, other):
        value = losses.cosine_loss(x, target).loss.item()
        assert -1e-12 <= value <= 1.0 + 1e-12 < 2.0


@given(rows=rows_of_four, temperature=st.floats(0.1, 10))
def test_the_gradient_of_the_exact_feedback_is_its_formula(
    rows: list[tuple[float, ...]], temperature: float
) -> None:
    x, direction, _ = doubles(rows)
    leaf = x.clone().requires_grad_()
    gradient = gradient_of(
        losses.exact_feedback(leaf, direction, weight=0.3, temperature=temperature), leaf
    )
    q = (x / temperature).softmax(-1)
    inner = direction - (q * direction).sum(-1, keepdim=True)
    expected = 0.3 / (len(x) * temperature) * q * inner
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
