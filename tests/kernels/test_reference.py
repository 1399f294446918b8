"""The reference against arithmetic done by hand, number by number, and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpl_fast import losses

DOUBLE = torch.float64


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(target: list[float], row: list[float]) -> float:
    return -sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True))


def one_hot(index: int, classes: int, smoothing: float = 0.0) -> list[float]:
    return [(1 - smoothing) * (c == index) + smoothing / classes for c in range(classes)]


LABELED = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]
WEAK = [[2.0, 0.0, -1.0], [0.3, 0.2, 0.1]]  # sure of class 0, unsure
STRONG = [[0.5, 1.0, -0.5], [1.5, 0.0, -2.0]]  # arg-max 1 and 0
TARGET = [2, 1]
LOGITS = torch.tensor(LABELED + WEAK + STRONG, dtype=DOUBLE)


def teacher(logits: Tensor = LOGITS, **options: object) -> losses.TeacherOut:
    arguments: dict[str, object] = {
        "uda_weight": 8.0,
        "feedback": -0.25,
        "temperature": 0.7,
        "threshold": 0.6,
        "label_smoothing": 0.1,
        "truth": torch.tensor([0, 1]),
        **options,
    }
    return losses.teacher_loss(logits, torch.tensor(TARGET), 2, **arguments)  # type: ignore[arg-type]


def test_teacher_loss_by_hand() -> None:
    out = teacher()
    sup = sum(
        cross_entropy(one_hot(y, 3, 0.1), row) for y, row in zip(TARGET, LABELED, strict=True)
    )
    q = [softmax(row, 0.7) for row in WEAK]
    assert max(q[0]) > 0.6 > max(q[1])  # the mask keeps the first pair alone
    uda = cross_entropy(q[0], STRONG[0]) / 2  # over ALL rows, kept or not
    mpl = sum(cross_entropy(one_hot(0, 3), row) for row in STRONG) / 2
    entropy = -sum(p * math.log(p) for row in q for p in row) / 2
    assert out.sup.item() == pytest.approx(sup / 2, rel=1e-6)
    assert out.uda.item() == pytest.approx(uda, rel=1e-6)
    assert out.mpl.item() == pytest.approx(mpl, rel=1e-6)
    assert out.loss.item() == pytest.approx(sup / 2 + 8.0 * uda - 0.25 * mpl, rel=1e-12)
    assert out.mask_rate.item() == 0.5
    assert out.confidence.item() == pytest.approx((max(q[0]) + max(q[1])) / 2, rel=1e-6)
    assert out.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert out.label.tolist() == [0, 0]
    assert out.pseudo_accuracy.item() == 0.5


def test_threshold_is_met_by_equality() -> None:
    logits = torch.zeros(2, 4)
    for threshold, rate in ((0.25, 1.0), (0.2500001, 0.0)):
        out = losses.teacher_loss(
            logits,
            torch.empty(0, dtype=torch.int64),
            1,
            uda_weight=1.0,
            feedback=0.0,
            threshold=threshold,
        )
        assert out.mask_rate.item() == rate


@pytest.mark.parametrize(
    ("pseudo", "labels"), [("weak", [0, 0]), ("strong", [1, 0]), (torch.tensor([2, 1]), [2, 1])]
)
def test_pseudo_chooses_the_label_of_the_feedback_term(
    pseudo: str | Tensor, labels: list[int]
) -> None:
    out = teacher(pseudo=pseudo)
    mpl = sum(cross_entropy(one_hot(y, 3), row) for y, row in zip(labels, STRONG, strict=True))
    assert out.label.tolist() == labels
    assert out.mpl.item() == pytest.approx(mpl / 2, rel=1e-6)


@pytest.mark.parametrize("feedback", [0.7, 0.0, -0.7])
@pytest.mark.parametrize("pseudo", ["weak", "strong"])
def test_teacher_gradient_is_that_of_finite_differences(feedback: float, pseudo: str) -> None:
    """Row by row, since weak rows are constants to the gradient but not to the value."""
    labeled, weak, strong = (x.clone() for x in LOGITS.split(2))
    labeled.requires_grad_()
    strong.requires_grad_()

    def loss(labeled: Tensor, strong: Tensor) -> Tensor:
        return teacher(torch.cat((labeled, weak, strong)), feedback=feedback, pseudo=pseudo).loss

    assert torch.autograd.gradcheck(loss, (labeled, strong))


def test_weak_rows_get_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(teacher(logits).loss, logits)
    assert gradient[2:4].abs().max().item() == 0.0
    assert gradient[4].abs().max().item() > 0.1


def test_positive_feedback_makes_the_label_likelier() -> None:
    """h > 0 says the labels helped: descending must raise their logit."""
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(teacher(logits, uda_weight=0.0, feedback=1.0).loss, logits)
    assert gradient[4:, 0].max().item() < 0.0 < gradient[4:, 1:].min().item()


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 0), (0, 2), (0, 0)])
def test_rows_of_a_kind_may_be_missing(labeled: int, unlabeled: int) -> None:
    rows = [*LABELED[:labeled], *WEAK[:unlabeled], *STRONG[:unlabeled]]
    logits = torch.tensor(rows, dtype=DOUBLE).reshape(-1, 3).requires_grad_()
    out = losses.teacher_loss(
        logits, torch.tensor(TARGET[:labeled]).long(), unlabeled, uda_weight=1.0, feedback=0.5
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.isfinite().all()
    whole = losses.teacher_loss(LOGITS, torch.tensor(TARGET), 2, uda_weight=1.0, feedback=0.5)
    for name in ("sup",) if labeled else ("uda", "mpl", "mask_rate", "entropy"):
        expected = getattr(whole, name).item() if labeled + unlabeled else 0.0
        assert getattr(out, name).item() == expected
    for name in ("uda", "mpl", "mask_rate", "entropy") if not unlabeled else ("sup",):
        assert getattr(out, name).item() == 0.0


def test_smoothed_ce_by_hand() -> None:
    out = losses.smoothed_ce(LOGITS[:2], torch.tensor(TARGET), label_smoothing=0.2)
    rows = [cross_entropy(one_hot(y, 3, 0.2), row) for y, row in zip(TARGET, LABELED, strict=True)]
    assert out.loss.item() == pytest.approx(sum(rows) / 2, rel=1e-12)
    assert out.accuracy.item() == 0.5


def test_ignored_rows_add_nothing_and_still_count() -> None:
    out = losses.smoothed_ce(LOGITS[:2], torch.tensor([-100, 1]))
    assert out.loss.item() == pytest.approx(cross_entropy(one_hot(1, 3), LABELED[1]) / 2)
    assert out.accuracy.item() == 0.5


@pytest.mark.parametrize("target", [-1, 3, 1 << 40])
def test_a_label_out_of_range_is_nan(target: int) -> None:
    assert losses.smoothed_ce(LOGITS[:1], torch.tensor([target])).loss.isnan()


def test_padding_columns_change_nothing() -> None:
    padded = torch.cat((LOGITS, torch.full((6, 5), 9.0, dtype=DOUBLE)), 1).requires_grad_()
    out = teacher(padded, num_classes=3)
    (gradient,) = torch.autograd.grad(out.loss, padded)
    assert out.loss.item() == teacher().loss.item()
    assert gradient[:, 3:].abs().max().item() == 0.0


def test_student_loss_by_hand() -> None:
    pseudo, weight = torch.tensor([1, 2]), torch.tensor([1.0, 0.25])
    logits = LOGITS[[0, 1, 4, 5]].clone().requires_grad_()
    out = losses.student_loss(
        logits, pseudo, torch.tensor(TARGET), label_smoothing=0.1, weight=weight
    )
    rows = [cross_entropy(one_hot(y, 3, 0.1), row) for y, row in zip((1, 2), STRONG, strict=True)]
    old = [cross_entropy(one_hot(y, 3), row) for y, row in zip(TARGET, LABELED, strict=True)]
    assert out.loss.item() == pytest.approx((rows[0] + 0.25 * rows[1]) / 2, rel=1e-12)
    assert out.labeled_ce.item() == pytest.approx(sum(old) / 2, rel=1e-6)
    assert out.labeled_accuracy.item() == 0.5
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient[:2].abs().max().item() == 0.0
    alone = losses.student_loss(logits[2:], pseudo, label_smoothing=0.1, weight=weight)
    assert alone.loss.item() == out.loss.item()
    assert alone.labeled_ce.item() == 0.0


def test_pseudo_labels_by_hand() -> None:
    weak = torch.tensor(WEAK)
    out = losses.pseudo_labels(weak, temperature=0.5)
    q = [softmax(row, 0.5) for row in WEAK]
    assert out.label.tolist() == [0, 0]
    assert out.confidence.tolist() == pytest.approx([max(row) for row in q])
    assert out.entropy.tolist() == pytest.approx(
        [-sum(p * math.log(p) for p in row) for row in q], rel=1e-5
    )


def test_uniform_numbers_sample_the_label() -> None:
    weak = torch.tensor([[0.0, math.log(2.0), math.log(5.0), -math.inf]]).expand(8, 4)
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.3, 0.37, 0.38, 0.9, 1 - 2**-24])
    out = losses.pseudo_labels(weak, uniforms=uniforms)
    # p is 1/8, 2/8, 5/8, 0: the edges lie at 0.125 and 0.375.
    assert out.label.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_impossible_classes_stay_finite() -> None:
    row = [1.0, -math.inf, 0.0]
    logits = torch.tensor([row, row], requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    out = losses.teacher_loss(logits, none, 1, uda_weight=1.0, feedback=1.0)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert out.uda.item() == pytest.approx(out.entropy.item())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-2, 1e-8, 1e-38])
def test_a_tiny_temperature_is_the_arg_max(temperature: float) -> None:
    out = losses.pseudo_labels(torch.tensor([[80.0, 90.0, 90.0 - 1.0]]), temperature=temperature)
    assert out.confidence.tolist() == [1.0]
    assert out.entropy.item() == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_lifted(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).requires_grad_()
    out = teacher(logits)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(teacher(logits.detach().double()).loss.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.dtype == dtype


def test_feedback_by_hand() -> None:
    old, new = torch.tensor(2.0), torch.tensor(1.5)
    assert losses.mpl_feedback(old, new).item() == 0.5
    average = torch.tensor(0.1)
    h = losses.mpl_feedback(old, new, average, momentum=0.75)
    assert average.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert h.item() == pytest.approx(0.5 - 0.2)


finite = st.floats(-20, 20, width=32)
ORDER = [2, 0, 3, 1]


@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=6), finite)
def test_shift_and_order_of_classes_do_not_matter(
    rows: list[tuple[float, ...]], shift: float
) -> None:
    """And each row of the gradient adds up to 0."""
    weak = torch.tensor(rows, dtype=DOUBLE)
    base = torch.cat((weak, weak.flip(0)))
    label = weak.argmax(-1)  # given, since a tie would break otherwise in another order
    none = torch.empty(0, dtype=torch.int64)

    def run(x: Tensor, pseudo: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        out = losses.teacher_loss(
            x, none, len(rows), uda_weight=2.0, feedback=0.3, temperature=0.5, pseudo=pseudo
        )
        return out.loss.item(), torch.autograd.grad(out.loss, x)[0]

    value, gradient = run(base, label)
    assert gradient.sum(-1).abs().max().item() < 1e-12
    assert run(base + shift, label)[0] == pytest.approx(value, rel=1e-9, abs=1e-9)
    where = torch.tensor([ORDER.index(i) for i in range(4)])
    other_value, other_gradient = run(base[:, ORDER], where[label])
    assert other_value == pytest.approx(value, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient[:, ORDER])


def test_nothing_reads_a_value_on_the_host() -> None:
    """Meta tensors have no values: whatever would wait for a GPU raises here."""
    logits = torch.empty(20, 16, device="meta", requires_grad=True)  # 4 labeled, 8 pairs
    target = torch.empty(4, dtype=torch.int64, device="meta")
    scalar = torch.empty((), device="meta")
    uniforms = torch.empty(8, device="meta")
    label = losses.pseudo_labels(logits[4:12], uniforms=uniforms).label
    student = losses.student_loss(logits[:12], label, target, weight=uniforms)
    h = losses.mpl_feedback(student.labeled_ce, losses.smoothed_ce(logits[:4], target).loss, scalar)
    out = losses.teacher_loss(
        logits, target, 8, uda_weight=scalar, feedback=h, pseudo=label, truth=label
    )
    (gradient,) = torch.autograd.grad(out.loss + student.loss, logits)
    assert gradient.shape == logits.shape
