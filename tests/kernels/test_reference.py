"""The teacher's loss in plain PyTorch against arithmetic done by hand and finite differences.

Also what holds for all of the reference: float types, padding, and that nothing waits for a GPU.
"""

import math

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import (
    DOUBLE,
    LABELED,
    LOGITS,
    NONE,
    STRONG,
    TARGET,
    WEAK,
    cross_entropy,
    gradient_of,
    one_hot,
    softmax,
)

TERMS = ("loss", "sup", "uda", "mpl")
OPTIONS: dict[str, object] = {
    "uda_weight": 8.0,
    "feedback": -0.25,
    "temperature": 0.7,
    "threshold": 0.6,
    "label_smoothing": 0.1,
    "truth": torch.tensor([0, 1]),
}


def teacher(logits: Tensor = LOGITS, **options: object) -> losses.TeacherOut:
    arguments = {**OPTIONS, **options}
    return losses.teacher_loss(logits, torch.tensor(TARGET), 2, **arguments)  # type: ignore[arg-type]


def teacher_and_grad(
    logits: Tensor = LOGITS, **options: object
) -> tuple[losses.TeacherOut, Tensor]:
    arguments = {**OPTIONS, **options}
    return losses.teacher_loss_and_grad(logits, torch.tensor(TARGET), 2, **arguments)  # type: ignore[arg-type]


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
            logits, NONE, 1, uda_weight=1.0, feedback=0.0, threshold=threshold
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
def test_gradients_of_all_terms_are_those_of_finite_differences(
    feedback: float, pseudo: str
) -> None:
    """Row by row, since weak rows are constants to the gradient but not to the value."""
    labeled, weak, strong = (x.clone() for x in LOGITS.split(2))
    labeled.requires_grad_()
    strong.requires_grad_()

    def terms(labeled: Tensor, strong: Tensor) -> tuple[Tensor, ...]:
        out = teacher(torch.cat((labeled, weak, strong)), feedback=feedback, pseudo=pseudo)
        return out.loss, out.sup, out.uda, out.mpl

    assert torch.autograd.gradcheck(terms, (labeled, strong))


def test_gradients_of_the_terms_by_hand() -> None:
    logits = LOGITS.clone().requires_grad_()
    out = teacher(logits)
    sup, uda, mpl = (torch.zeros(6, 3, dtype=DOUBLE) for _ in range(3))
    for i in range(2):
        for c in range(3):
            wanted = one_hot(TARGET[i], 3, 0.1)[c]
            sup[i, c] = (softmax(LABELED[i])[c] - wanted) / 2
            mpl[4 + i, c] = (softmax(STRONG[i])[c] - one_hot(0, 3)[c]) / 2
    for c in range(3):  # the second pair is masked out
        uda[4, c] = (softmax(STRONG[0])[c] - softmax(WEAK[0], 0.7)[c]) / 2
    for name, expected in {"sup": sup, "uda": uda, "mpl": mpl}.items():
        torch.testing.assert_close(gradient_of(getattr(out, name), logits), expected)
    torch.testing.assert_close(gradient_of(out.loss, logits), sup + 8.0 * uda - 0.25 * mpl)


def test_any_upstream_gradients_add_up() -> None:
    logits = LOGITS.clone().requires_grad_()
    out = teacher(logits)
    terms = [getattr(out, name) for name in TERMS]
    above = torch.tensor([0.5, -2.0, 3.0, 0.25], dtype=DOUBLE)
    alone = [gradient_of(term, logits) for term in terms]
    (together,) = torch.autograd.grad(terms, logits, list(above))
    torch.testing.assert_close(
        together, sum((a * g for a, g in zip(above, alone, strict=True)), torch.zeros(()))
    )


@pytest.mark.parametrize("scale", [None, 4.0])
def test_one_pass_is_the_plain_loss_and_its_gradient(scale: float | None) -> None:
    logits = LOGITS.clone().requires_grad_()
    plain = teacher(logits)
    out, gradient = teacher_and_grad(
        logits, grad_scale=None if scale is None else torch.tensor(scale)
    )
    for name, value in out._asdict().items():
        assert torch.equal(value, getattr(plain, name)), name
        assert not value.requires_grad, name
    torch.testing.assert_close(gradient, (scale or 1.0) * gradient_of(plain.loss, logits))
    assert not gradient.requires_grad
    assert logits.grad is None
    logits.backward(gradient)
    torch.testing.assert_close(logits.grad, gradient)
    with torch.no_grad():
        _, silent = teacher_and_grad(LOGITS)
    torch.testing.assert_close(silent * (scale or 1.0), gradient)


def test_the_scale_comes_before_rounding() -> None:
    """float16 ends at 6e-8: scaled afterwards, these gradients would be 0."""
    options: dict[str, object] = {"uda_weight": 0.0, "feedback": 1e-8, "label_smoothing": 0.0}
    logits = LOGITS.half()
    _, lost = teacher_and_grad(logits, **options)
    _, kept = teacher_and_grad(logits, **options, grad_scale=torch.tensor(65536.0))
    _, exact = teacher_and_grad(logits.double(), **options)
    assert lost.dtype == kept.dtype == torch.float16
    assert lost[4:].abs().max().item() == 0.0
    torch.testing.assert_close(kept[4:].double(), exact[4:] * 65536, rtol=2**-11, atol=2**-25)


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


@pytest.mark.parametrize("target", [-1, 3, 1 << 40])
def test_a_label_out_of_range_is_nan(target: int) -> None:
    assert losses.smoothed_ce(LOGITS[:1], torch.tensor([target])).loss.isnan()
    pseudo = torch.tensor([0, target])
    _, gradient = teacher_and_grad(pseudo=pseudo)
    assert teacher(pseudo=pseudo).mpl.isnan()
    assert gradient.isnan().any(-1).tolist() == [False] * 5 + [True]


def test_no_pseudo_label_is_ignored() -> None:
    """The index that leaves out a target is no class, so as a pseudo label it is a mistake."""
    assert teacher(pseudo=torch.tensor([0, -100])).mpl.isnan()


def test_padding_columns_change_nothing() -> None:
    padded = torch.cat((LOGITS, torch.full((6, 5), 9.0, dtype=DOUBLE)), 1).requires_grad_()
    out = teacher(padded, num_classes=3)
    (gradient,) = torch.autograd.grad(out.loss, padded)
    assert out.loss.item() == teacher().loss.item()
    assert gradient[:, 3:].abs().max().item() == 0.0


def test_impossible_classes_stay_finite() -> None:
    row = [1.0, -math.inf, 0.0]
    logits = torch.tensor([row, row], requires_grad=True)
    out = losses.teacher_loss(logits, NONE, 1, uda_weight=1.0, feedback=1.0)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert out.uda.item() == pytest.approx(out.entropy.item())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_lifted(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).requires_grad_()
    out = teacher(logits)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(teacher(logits.detach().double()).loss.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.dtype == dtype


def test_nothing_reads_a_value_on_the_host() -> None:
    """Meta tensors have no values: whatever would wait for a GPU raises here."""
    logits = torch.empty(20, 16, device="meta", requires_grad=True)  # 4 labeled, 8 pairs
    target = torch.empty(4, dtype=torch.int64, device="meta")
    scalar = torch.empty((), device="meta")
    uniforms = torch.empty(8, device="meta")
    weak, strong = logits[4:12], logits[12:]
    label = losses.pseudo_labels(weak, uniforms=uniforms).label
    student = losses.student_loss(logits[:12], label, target, weight=uniforms)
    soft = losses.student_loss(logits[:12], strong, target, label_smoothing=0.1)
    h = losses.mpl_feedback(student.labeled_ce, losses.smoothed_ce(logits[:4], target).loss, scalar)
    out = losses.teacher_loss(
        logits, target, 8, uda_weight=scalar, feedback=h, pseudo=label, truth=label
    )
    cosine = losses.cosine_loss(strong, weak, threshold=0.5).loss
    cosine = cosine + losses.cosine_loss(strong, label).loss
    exact = losses.exact_feedback(strong, weak, weight=scalar)
    total = out.loss + student.loss + soft.loss + cosine + exact
    results = [
        gradient_of(total, logits),
        losses.student_loss_and_grad(logits[:12], strong, target, grad_scale=scalar)[1],
        losses.student_loss_and_grad(logits[:12], label, target)[1],
        losses.teacher_loss_and_grad(
            logits, target, 8, uda_weight=scalar, feedback=h, grad_scale=scalar
        )[1],
    ]
    assert [x.shape[0] for x in results] == [20, 12, 12, 20]
    assert all(x.device.type == "meta" for x in results)
