"""Labeled CE, pseudo labels, cosine loss and exact feedback in plain PyTorch, done by hand."""

import math

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import (
    DOUBLE,
    LABELED,
    STRONG,
    TARGET,
    WEAK,
    cosine,
    cross_entropy,
    dot,
    gradient_of,
    one_hot,
    softmax,
)

LOGITS = torch.tensor(STRONG, dtype=DOUBLE)
SOFT = torch.tensor(WEAK, dtype=DOUBLE)
ROWS = torch.tensor(LABELED, dtype=DOUBLE)
HARD = torch.tensor([0, 2])
DIRECTION = [[0.3, -1.0, 2.0], [-0.5, 0.25, 0.0]]


def test_pseudo_labels_by_hand() -> None:
    out = losses.pseudo_labels(torch.tensor(WEAK), temperature=0.5)
    q = [softmax(row, 0.5) for row in WEAK]
    assert out.label.tolist() == [0, 0]
    assert out.confidence.tolist() == pytest.approx([max(row) for row in q])
    assert out.entropy.tolist() == pytest.approx(
        [-sum(p * math.log(p) for p in row) for row in q], rel=1e-5
    )


def test_uniform_numbers_sample_the_label() -> None:
    weak = torch.tensor([[0.0, math.log(2.0), math.log(5.0), -math.inf]]).expand(9, 4)
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.3, 0.37, 0.38, 0.9, 1 - 2**-24, 1.0])
    out = losses.pseudo_labels(weak, uniforms=uniforms)
    # p is 1/8, 2/8, 5/8, 0: the edges lie at 0.125 and 0.375.
    assert out.label.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    first = losses.pseudo_labels(weak.flip(-1), uniforms=uniforms).label
    assert first.tolist() == [1, 1, 1, 1, 1, 1, 3, 3, 3]  # never the impossible class 0


@pytest.mark.parametrize("temperature", [1e-2, 1e-8, 1e-38])
def test_a_tiny_temperature_is_the_arg_max(temperature: float) -> None:
    out = losses.pseudo_labels(torch.tensor([[80.0, 90.0, 90.0 - 1.0]]), temperature=temperature)
    assert out.confidence.tolist() == [1.0]
    assert out.entropy.item() == pytest.approx(0.0, abs=1e-30)


def test_smoothed_ce_by_hand() -> None:
    out = losses.smoothed_ce(ROWS, torch.tensor(TARGET), label_smoothing=0.2)
    rows = [cross_entropy(one_hot(y, 3, 0.2), row) for y, row in zip(TARGET, LABELED, strict=True)]
    assert out.loss.item() == pytest.approx(sum(rows) / 2, rel=1e-12)
    assert out.accuracy.item() == 0.5


def test_ignored_rows_add_nothing_and_still_count() -> None:
    out = losses.smoothed_ce(ROWS, torch.tensor([-100, 1]))
    assert out.loss.item() == pytest.approx(cross_entropy(one_hot(1, 3), LABELED[1]) / 2)
    assert out.accuracy.item() == 0.5


@pytest.mark.parametrize(
    ("target", "q"),
    [(HARD, [one_hot(0, 3), one_hot(2, 3)]), (SOFT, [softmax(row, 0.7) for row in WEAK])],
    ids=["hard", "soft"],
)
def test_cosine_loss_and_its_gradient_by_hand(target: Tensor, q: list[list[float]]) -> None:
    logits = LOGITS.clone().requires_grad_()
    out = losses.cosine_loss(logits, target, temperature=0.7)
    p = [softmax(row) for row in STRONG]
    rows = [1 - cosine(a, b) for a, b in zip(p, q, strict=True)]
    assert out.loss.item() == pytest.approx(sum(rows) / 2, rel=1e-12)
    assert out.mask_rate.item() == 1.0
    expected = torch.zeros(2, 3, dtype=DOUBLE)
    for i in range(2):
        pp, qq = dot(p[i], p[i]), dot(q[i], q[i])
        for c in range(3):
            change = q[i][c] / math.sqrt(pp * qq) - cosine(p[i], q[i]) * p[i][c] / pp
            expected[i, c] = -p[i][c] * change / 2
    torch.testing.assert_close(gradient_of(out.loss, logits), expected)
    assert torch.autograd.gradcheck(
        lambda x: losses.cosine_loss(x, target, temperature=0.7).loss, (logits,)
    )


def test_cosine_loss_leaves_out_unsure_targets() -> None:
    logits = LOGITS.clone().requires_grad_()
    out = losses.cosine_loss(logits, SOFT, temperature=0.7, threshold=0.6)
    row = 1 - cosine(softmax(STRONG[0]), softmax(WEAK[0], 0.7))
    assert out.loss.item() == pytest.approx(row / 2, rel=1e-12)  # over ALL rows
    assert out.mask_rate.item() == 0.5
    assert gradient_of(out.loss, logits)[1].abs().max().item() == 0.0


def test_a_class_is_a_target_of_confidence_one() -> None:
    assert losses.cosine_loss(LOGITS, HARD, threshold=1.0).mask_rate.item() == 1.0
    out = losses.cosine_loss(LOGITS, HARD, threshold=1.1)
    assert out.mask_rate.item() == out.loss.item() == 0.0


def test_cosine_loss_ends_where_distributions_agree_or_exclude_each_other() -> None:
    assert losses.cosine_loss(LOGITS, LOGITS + 3.0).loss.item() == pytest.approx(0.0, abs=1e-15)
    sure = torch.tensor([[0.0, -math.inf]], dtype=DOUBLE, requires_grad=True)
    apart = losses.cosine_loss(sure, torch.tensor([1])).loss
    assert apart.item() == 1.0
    assert gradient_of(apart, sure).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bad", [-100, -1, 3, 1 << 40])
def test_a_cosine_target_out_of_range_is_nan(bad: int) -> None:
    logits = LOGITS.clone().requires_grad_()
    out = losses.cosine_loss(logits, torch.tensor([1, bad]))
    assert out.loss.isnan()
    assert gradient_of(out.loss, logits).isnan().any(-1).tolist() == [False, True]


def test_a_cosine_target_is_a_constant() -> None:
    target = SOFT.clone().requires_grad_()
    losses.cosine_loss(LOGITS.clone().requires_grad_(), target).loss.backward()
    assert target.grad is None


def test_exact_feedback_and_its_gradient_by_hand() -> None:
    logits = LOGITS.clone().requires_grad_()
    direction = torch.tensor(DIRECTION, requires_grad=True)
    weight = torch.tensor(0.4, requires_grad=True)
    out = losses.exact_feedback(logits, direction, weight=weight, temperature=0.7)
    q = [softmax(row, 0.7) for row in STRONG]
    means = [dot(a, b) for a, b in zip(q, DIRECTION, strict=True)]
    k = weight.item() / 2
    assert out.item() == pytest.approx(k * sum(means), rel=1e-6)
    expected = [
        [k / 0.7 * q[i][c] * (DIRECTION[i][c] - means[i]) for c in range(3)] for i in range(2)
    ]
    wanted = torch.tensor(expected, dtype=DOUBLE)
    torch.testing.assert_close(gradient_of(out, logits), wanted, rtol=1e-6, atol=1e-9)
    out.backward()
    assert direction.grad is None
    assert weight.grad is None


def test_exact_feedback_gradient_is_that_of_finite_differences() -> None:
    logits = LOGITS.clone().requires_grad_()
    direction = torch.tensor(DIRECTION)
    assert torch.autograd.gradcheck(
        lambda x: losses.exact_feedback(x, direction, weight=-0.4, temperature=0.7), (logits,)
    )


def test_exact_feedback_is_the_meta_gradient_of_a_step() -> None:
    """Through a linear student's SGD step in double precision, where autograd can follow it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=generator)

    images, labeled, weights, rate = random(6, 5), random(4, 5), random(5, 3), 0.7
    target = torch.tensor([0, 1, 2, 1])
    teacher = random(6, 3).requires_grad_()

    student = weights.clone().requires_grad_()
    q = teacher.softmax(-1)
    loss = -(q * (images @ student).log_softmax(-1)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    moved = student - rate * gradient
    judged = torch.nn.functional.cross_entropy(labeled @ moved, target)
    (exact,) = torch.autograd.grad(judged, teacher, retain_graph=True)
    (v,) = torch.autograd.grad(judged, moved)

    # The derivative of log softmax(images @ weights) along v, by hand.
    change = images @ v
    direction = change - ((images @ weights).softmax(-1) * change).sum(-1, keepdim=True)
    ours = losses.exact_feedback(teacher, direction, weight=rate)
    torch.testing.assert_close(gradient_of(ours, teacher), exact, rtol=1e-10, atol=1e-14)
    assert exact.abs().max().item() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_student_that_weighs_rows_is_met_by_weighing_directions(smoothing: float) -> None:
    """A mask and smoothed labels, again through a step that autograd follows."""
    generator = torch.Generator().manual_seed(1)
    images, labeled, weights = (
        torch.randn(*shape, dtype=DOUBLE, generator=generator) for shape in [(6, 5), (4, 5), (5, 3)]
    )
    mask = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0], dtype=DOUBLE)
    teacher = torch.randn(6, 3, dtype=DOUBLE, generator=generator).requires_grad_()

    student = weights.clone().requires_grad_()
    q = (1.0 - smoothing) * teacher.softmax(-1) + smoothing / 3
    loss = -(mask[:, None] * q * (images @ student).log_softmax(-1)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    moved = student - 0.7 * gradient
    judged = torch.nn.functional.cross_entropy(labeled @ moved, torch.tensor([0, 1, 2, 1]))
    (exact,) = torch.autograd.grad(judged, teacher, retain_graph=True)
    (v,) = torch.autograd.grad(judged, moved)

    change = images @ v
    direction = change - ((images @ weights).softmax(-1) * change).sum(-1, keepdim=True)
    share = (1.0 - smoothing) * mask[:, None]
    ours = losses.exact_feedback(teacher, share * direction, weight=0.7)
    torch.testing.assert_close(gradient_of(ours, teacher), exact, rtol=1e-10, atol=1e-14)
    assert exact.abs().amax(-1).gt(1e-4).tolist() == mask.gt(0).tolist()


def test_padding_columns_change_nothing() -> None:
    padding = torch.full((2, 5), 9.0, dtype=DOUBLE)
    logits = torch.cat((LOGITS, padding), 1).requires_grad_()
    target = torch.cat((SOFT, padding), 1)
    value = losses.cosine_loss(logits, target, num_classes=3).loss
    assert value.item() == losses.cosine_loss(LOGITS, SOFT).loss.item()
    exact = losses.exact_feedback(logits, target, weight=1.0, num_classes=3)
    assert exact.item() == losses.exact_feedback(LOGITS, SOFT, weight=1.0).item()
    assert gradient_of(value + exact, logits)[:, 3:].abs().max().item() == 0.0


def test_no_rows_give_zero() -> None:
    empty = torch.empty(0, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    out = losses.cosine_loss(empty, none)
    assert out.loss.item() == out.mask_rate.item() == 0.0
    exact = losses.exact_feedback(empty, torch.empty(0, 3), weight=1.0)
    assert exact.item() == 0.0
    assert gradient_of(out.loss + exact, empty).shape == (0, 3)
    assert losses.pseudo_labels(empty, uniforms=torch.empty(0)).label.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_lifted(dtype: torch.dtype) -> None:
    logits, other = LOGITS.to(dtype).requires_grad_(), SOFT.to(dtype)
    x, y = logits.detach().double(), other.double()
    cosine_out = losses.cosine_loss(logits, other).loss
    exact = losses.exact_feedback(logits, other, weight=2.0)
    assert cosine_out.dtype == exact.dtype == torch.float32
    assert cosine_out.item() == pytest.approx(losses.cosine_loss(x, y).loss.item(), rel=1e-5)
    wanted = losses.exact_feedback(x, y, weight=2.0).item()
    assert exact.item() == pytest.approx(wanted, rel=1e-6)
    assert gradient_of(cosine_out + exact, logits).dtype == dtype
