"""The student's loss and the feedback in plain PyTorch, against arithmetic done by hand."""

import math

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import (
    DOUBLE,
    LABELED,
    LOGITS,
    STRONG,
    TARGET,
    WEAK,
    cross_entropy,
    gradient_of,
    one_hot,
    smooth,
    softmax,
)

ROWS = LOGITS[[0, 1, 4, 5]]  # labeled | strong
LABELS = torch.tensor(TARGET)
HARD = torch.tensor([1, 2])
SOFT = torch.tensor(WEAK, dtype=DOUBLE)
WEIGHT = torch.tensor([1.0, 0.25])
KINDS = pytest.mark.parametrize("pseudo", [HARD, SOFT], ids=["hard", "soft"])


def student(
    logits: Tensor = ROWS,
    pseudo: Tensor = HARD,
    target: Tensor | None = LABELS,
    label_smoothing: float = 0.1,
    weight: Tensor | None = WEIGHT,
    num_classes: int | None = None,
) -> losses.StudentOut:
    return losses.student_loss(
        logits,
        pseudo,
        target,
        label_smoothing=label_smoothing,
        temperature=0.7,
        weight=weight,
        num_classes=num_classes,
    )


@pytest.mark.parametrize(
    ("pseudo", "q"),
    [
        (HARD, [one_hot(1, 3), one_hot(2, 3)]),
        (SOFT, [softmax(row, 0.7) for row in WEAK]),
    ],
    ids=["hard", "soft"],
)
def test_student_loss_by_hand(pseudo: Tensor, q: list[list[float]]) -> None:
    logits = ROWS.clone().requires_grad_()
    out = student(logits, pseudo)
    targets = [smooth(row, 0.1) for row in q]
    rows = [cross_entropy(t, row) for t, row in zip(targets, STRONG, strict=True)]
    assert out.loss.item() == pytest.approx((rows[0] + 0.25 * rows[1]) / 2, rel=1e-12)
    expected = torch.zeros(4, 3, dtype=DOUBLE)
    for i in range(2):
        for c in range(3):
            share = WEIGHT[i].item() / 2
            expected[2 + i, c] = share * (softmax(STRONG[i])[c] - targets[i][c])
    torch.testing.assert_close(gradient_of(out.loss, logits), expected)


def test_labeled_rows_are_only_looked_at() -> None:
    logits = ROWS.clone().requires_grad_()
    out = student(logits)
    old = [cross_entropy(one_hot(y, 3), row) for y, row in zip(TARGET, LABELED, strict=True)]
    assert out.labeled_ce.item() == pytest.approx(sum(old) / 2, rel=1e-6)
    assert out.labeled_accuracy.item() == 0.5
    assert not out.labeled_ce.requires_grad
    assert gradient_of(out.loss, logits)[:2].abs().max().item() == 0.0
    alone = student(logits[2:], target=None)
    assert alone.loss.item() == out.loss.item()
    assert alone.labeled_ce.item() == alone.labeled_accuracy.item() == 0.0


def test_old_and_new_are_taken_alike() -> None:
    """Also of a labeled batch with a row left out: a student that stands still hears 0."""
    target = torch.tensor([-100, 1])
    old = student(target=target).labeled_ce
    assert old.item() == pytest.approx(cross_entropy(one_hot(1, 3), LABELED[1]) / 2, rel=1e-6)
    new = losses.smoothed_ce(ROWS[:2].float(), target).loss
    assert losses.mpl_feedback(old, new).item() == pytest.approx(0.0, abs=1e-7)


@KINDS
def test_gradient_is_that_of_finite_differences(pseudo: Tensor) -> None:
    logits = ROWS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: student(x, pseudo).loss, (logits,))


@KINDS
@pytest.mark.parametrize("scale", [None, 4.0])
def test_one_pass_is_the_plain_loss_and_its_gradient(pseudo: Tensor, scale: float | None) -> None:
    logits = ROWS.clone().requires_grad_()
    plain = student(logits, pseudo)
    out, gradient = losses.student_loss_and_grad(
        logits,
        pseudo,
        LABELS,
        label_smoothing=0.1,
        temperature=0.7,
        weight=WEIGHT,
        grad_scale=None if scale is None else torch.tensor(scale),
    )
    for name, value in out._asdict().items():
        assert torch.equal(value, getattr(plain, name)), name
        assert not value.requires_grad, name
    torch.testing.assert_close(gradient, (scale or 1.0) * gradient_of(plain.loss, logits))
    assert logits.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_pass_gradient_has_the_type_of_the_logits(dtype: torch.dtype) -> None:
    out, gradient = losses.student_loss_and_grad(ROWS[2:].to(dtype), SOFT.bfloat16())
    assert (out.loss.dtype, gradient.dtype) == (torch.float32, dtype)


def test_labels_and_weights_are_constants() -> None:
    logits, pseudo, weight = (x.clone().requires_grad_() for x in (ROWS, SOFT, WEIGHT))
    student(logits, pseudo, weight=weight).loss.backward()
    assert logits.grad is not None
    assert pseudo.grad is None
    assert weight.grad is None


def test_a_soft_label_of_ones_own_has_no_gradient() -> None:
    """Why the official code's feedback term teaches nothing: CE(sg softmax(z), z) is flat in z."""
    logits = ROWS[2:].clone().requires_grad_()
    loss = losses.student_loss(logits, logits).loss
    assert loss.item() > 0.5
    assert gradient_of(loss, logits).abs().max().item() < 1e-15


def test_a_cold_soft_label_is_the_hard_one() -> None:
    hard = losses.student_loss(ROWS[2:], SOFT.argmax(-1)).loss
    cold = losses.student_loss(ROWS[2:], SOFT, temperature=1e-8).loss
    assert cold.item() == pytest.approx(hard.item(), rel=1e-12)


def test_padding_columns_change_nothing() -> None:
    logits = torch.cat((ROWS, torch.full((4, 5), 9.0, dtype=DOUBLE)), 1).requires_grad_()
    pseudo = torch.cat((SOFT, torch.full((2, 5), 99.0, dtype=DOUBLE)), 1)
    out = student(logits, pseudo, num_classes=3)
    assert out.loss.item() == student(pseudo=SOFT).loss.item()
    assert gradient_of(out.loss, logits)[:, 3:].abs().max().item() == 0.0


@pytest.mark.parametrize("bad", [-100, -1, 3, 1 << 40])
def test_a_label_out_of_range_is_nan(bad: int) -> None:
    out, gradient = losses.student_loss_and_grad(ROWS, torch.tensor([1, bad]), LABELS)
    assert out.loss.isnan()
    assert not out.labeled_ce.isnan()
    assert gradient.isnan().any(-1).tolist() == [False, False, False, True]


def test_no_strong_rows_give_zero() -> None:
    for pseudo in (HARD[:0], SOFT[:0]):
        out, gradient = losses.student_loss_and_grad(ROWS[:2], pseudo, LABELS)
        assert out.loss.item() == 0.0 < out.labeled_ce.item()
        assert gradient.tolist() == [[0.0] * 3] * 2


def test_impossible_classes_stay_finite() -> None:
    minus = -torch.inf
    logits = torch.tensor([[1.0, minus, 0.0]], requires_grad=True)
    out = losses.student_loss(logits, torch.tensor([[0.0, minus, 2.0]]))
    expected = cross_entropy(softmax([0.0, 2.0]), [1.0, 0.0])
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient_of(out.loss, logits).isfinite().all()


def test_feedback_by_hand() -> None:
    old, new = torch.tensor(2.0), torch.tensor(1.5)
    assert losses.mpl_feedback(old, new).item() == 0.5
    average = torch.tensor(0.1)
    h = losses.mpl_feedback(old, new, average, momentum=0.75)
    assert average.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert h.item() == pytest.approx(0.5 - 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_feedback_is_float32_whatever_the_losses_are(dtype: torch.dtype) -> None:
    old, new = torch.tensor(2.0, dtype=dtype, requires_grad=True), torch.tensor(1.5, dtype=dtype)
    for average in (None, torch.tensor(0.5)):
        h = losses.mpl_feedback(old, new, average)
        assert (h.dtype, h.requires_grad, h.item()) == (torch.float32, False, 0.5 * (not average))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (2.0, math.nan, math.nan),
        (math.nan, 2.0, math.nan),
        (2.0, math.inf, -math.inf),
        (math.inf, 2.0, math.inf),
        (math.inf, math.inf, math.nan),
    ],
)
def test_feedback_that_is_not_finite_is_told_and_forgotten(
    old: float, new: float, wanted: float, momentum: float
) -> None:
    average = torch.tensor(0.3)
    losses_of_a_step = torch.tensor(old), torch.tensor(new)
    h = losses.mpl_feedback(*losses_of_a_step, average, momentum=momentum)
    assert h.item() == pytest.approx(wanted, nan_ok=True)
    assert losses.mpl_feedback(*losses_of_a_step).item() == pytest.approx(wanted, nan_ok=True)
    assert torch.equal(average, torch.tensor(0.3))
    sound = losses.mpl_feedback(torch.tensor(2.0), torch.tensor(1.0), average, momentum=momentum)
    assert average.item() == pytest.approx(momentum * 0.3 + (1.0 - momentum))
    assert sound.item() == pytest.approx(1.0 - average.item())
