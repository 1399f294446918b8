"""The losses against arithmetic by hand, finite differences, and a step that autograd follows."""

import math

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels import reference
from mpl_fast.kernels.outputs import Pseudo, TeacherInputs
from tests.kernels.cases import (
    DOUBLE,
    Backend,
    cosine,
    cross_entropy,
    dot,
    gradient_of,
    one_hot,
    smooth,
    softmax,
)

# Six rows of logits.
LABELED = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]
WEAK = [[2.0, 0.0, -1.0], [0.3, 0.2, 0.1]]  # sure of class 0, unsure
STRONG = [[0.5, 1.0, -0.5], [1.5, 0.0, -2.0]]  # arg-max 1 and 0
TARGET, HARD, TRUTH = [2, 1], [1, 2], [0, 1]
WEIGHT = [1.0, 0.25]
DIRECTION = [[0.3, -1.0, 2.0], [-0.5, 0.25, 0.0]]
LOGITS = torch.tensor(LABELED + WEAK + STRONG, dtype=DOUBLE)


def on(backend: Backend, values: list[list[float]]) -> Tensor:
    """In the widest type of a backend, requiring a gradient."""
    return torch.tensor(values, dtype=backend.dtype, device=backend.device, requires_grad=True)


def same(got: Tensor, wanted: Tensor | list[list[float]], backend: Backend) -> None:
    wanted = torch.as_tensor(wanted, dtype=DOUBLE)
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=backend.rel, atol=backend.rel)


def teacher_inputs(
    logits: Tensor, feedback: float = -0.25, pseudo: Pseudo = "weak"
) -> TeacherInputs:
    target, truth = (torch.tensor(y, device=logits.device) for y in (TARGET, TRUTH))
    return TeacherInputs(logits, target, 2, 8.0, feedback, 0.7, 0.6, 0.1, pseudo, truth)


def terms_by_hand(labels: list[int]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """sup, uda and mpl of LOGITS, and their gradients."""
    q = [softmax(row, 0.7) for row in WEAK]
    assert max(q[0]) > 0.6 > max(q[1])  # the mask keeps the first pair alone
    targets = [smooth(one_hot(y, 3), 0.1) for y in TARGET]
    hard = [one_hot(y, 3) for y in labels]
    values = {
        "sup": sum(map(cross_entropy, targets, LABELED)) / 2,
        "uda": cross_entropy(q[0], STRONG[0]) / 2,  # over ALL rows, kept or not
        "mpl": sum(map(cross_entropy, hard, STRONG)) / 2,
    }
    zero = [[0.0] * 3] * 2
    p = torch.tensor([softmax(row) for row in LABELED + STRONG], dtype=DOUBLE)
    wanted = torch.tensor([*targets, q[0], softmax(STRONG[1]), *hard], dtype=DOUBLE)
    none = torch.tensor(zero, dtype=DOUBLE)
    gradients = {
        "sup": torch.cat((p[:2] - wanted[:2], none, none)) / 2,
        "uda": torch.cat((none, none, p[2:] - wanted[2:4])) / 2,
        "mpl": torch.cat((none, none, p[2:] - wanted[4:])) / 2,
    }
    return values, gradients


@pytest.mark.parametrize(
    ("pseudo", "labels"), [("weak", [0, 0]), ("strong", [1, 0]), ("given", [2, 1])]
)
def test_teacher(pseudo: str, labels: list[int], backend: Backend) -> None:
    logits = LOGITS.to(backend.device, backend.dtype)
    given = torch.tensor(labels, device=logits.device)
    inputs = teacher_inputs(logits, pseudo=given if pseudo == "given" else pseudo)  # type: ignore[arg-type]
    out, gradient = losses.teacher_loss_and_grad(**inputs._asdict())
    values, gradients = terms_by_hand(labels)
    q = [softmax(row, 0.7) for row in WEAK]
    values["loss"] = values["sup"] + 8.0 * values["uda"] - 0.25 * values["mpl"]
    for name, value in values.items():
        assert getattr(out, name).item() == pytest.approx(value, rel=backend.rel), name
    assert out.confidence.item() == pytest.approx((max(q[0]) + max(q[1])) / 2, rel=1e-6)
    entropy = -sum(p * math.log(p) for row in q for p in row) / 2
    assert out.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert out.mask_rate.item() == 0.5
    assert out.label.tolist() == labels
    hits = sum(a == b for a, b in zip(labels, TRUTH, strict=True))
    assert out.pseudo_accuracy.item() == hits / 2
    same(gradient, gradients["sup"] + 8.0 * gradients["uda"] - 0.25 * gradients["mpl"], backend)
    without = losses.teacher_loss_and_grad(**inputs._replace(truth=None)._asdict())[0]
    assert without.pseudo_accuracy.item() == 0.0


@pytest.mark.parametrize("feedback", [0.7, 0.0, -0.7])
@pytest.mark.parametrize("pseudo", ["weak", "strong"])
def test_gradients_of_the_teachers_terms(feedback: float, pseudo: Pseudo) -> None:
    """Each alone, and row by row: weak rows are constants to the gradient, not to the value."""
    labeled, weak, strong = (x.clone() for x in LOGITS.split(2))

    def terms(labeled: Tensor, strong: Tensor) -> tuple[Tensor, ...]:
        logits = torch.cat((labeled, weak, strong))
        return reference.teacher_loss(teacher_inputs(logits, feedback, pseudo))[:4]

    assert torch.autograd.gradcheck(terms, (labeled.requires_grad_(), strong.requires_grad_()))
    logits = LOGITS.clone().requires_grad_()
    out = reference.teacher_loss(teacher_inputs(logits, feedback, pseudo))
    _, gradients = terms_by_hand(out.label.tolist())
    for name, wanted in gradients.items():
        torch.testing.assert_close(gradient_of(getattr(out, name), logits), wanted)
    carrying = {name for name, value in out._asdict().items() if value.requires_grad}
    assert carrying == {"loss", "sup", "uda", "mpl"}
    once, gradient = losses.teacher_loss_and_grad(
        **teacher_inputs(logits, feedback, pseudo)._asdict()
    )
    assert all(map(torch.equal, once, out))
    torch.testing.assert_close(gradient, gradient_of(out.loss, logits))
    logits.backward(gradient)
    assert logits.grad is not None and torch.equal(logits.grad, gradient)


def test_positive_feedback_makes_the_label_likelier(backend: Backend) -> None:
    """h > 0 means that the labels helped: descending must raise their logit."""
    inputs = teacher_inputs(LOGITS.to(backend.device, backend.dtype), feedback=1.0)
    _, gradient = losses.teacher_loss_and_grad(**inputs._replace(uda_weight=0.0)._asdict())
    assert gradient[4:, 0].max().item() < 0.0 < gradient[4:, 1:].min().item()


def test_smoothed_ce(backend: Backend) -> None:
    logits = on(backend, LABELED)
    target = torch.tensor(TARGET, device=logits.device)
    out = losses.smoothed_ce(logits, target, label_smoothing=0.2)
    targets = [smooth(one_hot(y, 3), 0.2) for y in TARGET]
    loss = sum(map(cross_entropy, targets, LABELED)) / 2
    assert out.loss.item() == pytest.approx(loss, rel=backend.rel)
    assert out.accuracy.item() == 0.5
    p = torch.tensor([softmax(row) for row in LABELED], dtype=DOUBLE)
    same(gradient_of(out.loss, logits), (p - torch.tensor(targets, dtype=DOUBLE)) / 2, backend)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_student(kind: str, backend: Backend) -> None:
    logits = on(backend, STRONG)
    weight = torch.tensor(WEIGHT, device=logits.device)
    hard = torch.tensor(HARD, device=logits.device)
    pseudo = hard if kind == "hard" else on(backend, WEAK)
    loss = losses.student_loss(logits, pseudo, label_smoothing=0.1, weight=weight)
    q = [one_hot(y, 3) for y in HARD] if kind == "hard" else [softmax(row) for row in WEAK]
    targets = [smooth(row, 0.1) for row in q]
    rows = map(cross_entropy, targets, STRONG)
    wanted = sum(w * ce for w, ce in zip(WEIGHT, rows, strict=True)) / 2
    assert loss.item() == pytest.approx(wanted, rel=backend.rel)
    expected = [
        [w * (p - t) / 2 for p, t in zip(softmax(row), target, strict=True)]
        for w, row, target in zip(WEIGHT, STRONG, targets, strict=True)
    ]
    same(gradient_of(loss, logits), expected, backend)
    once, gradient = losses.student_loss_and_grad(
        logits, pseudo, label_smoothing=0.1, weight=weight
    )
    assert torch.equal(once, loss.detach())
    same(gradient, expected, backend)
    if not backend.is_fused:
        assert torch.autograd.gradcheck(
            lambda x: losses.student_loss(x, pseudo, label_smoothing=0.1, weight=weight), (logits,)
        )


def test_a_soft_label_of_ones_own_has_no_gradient(backend: Backend) -> None:
    """The feedback term of the official code is flat: CE(sg softmax(z), z) has gradient 0 in z."""
    logits = on(backend, STRONG)
    loss = losses.student_loss(logits, logits)
    assert loss.item() > 0.5
    assert gradient_of(loss, logits).abs().max().item() < backend.rel


def test_impossible_classes_stay_finite(backend: Backend) -> None:
    logits = on(backend, [[1.0, -math.inf, 0.0]])
    loss = losses.student_loss(logits, on(backend, [[0.0, -math.inf, 2.0]]))
    expected = cross_entropy(softmax([0.0, 2.0]), [1.0, 0.0])
    assert loss.item() == pytest.approx(expected, rel=backend.rel)
    assert gradient_of(loss, logits).isfinite().all()
    both = logits.detach().repeat(2, 1)
    none = torch.empty(0, dtype=torch.int64, device=logits.device)
    out, gradient = losses.teacher_loss_and_grad(both, none, 1, uda_weight=1.0, feedback=1.0)
    assert out.uda.item() == pytest.approx(out.entropy.item(), rel=1e-6)
    assert gradient.isfinite().all()


def test_cosine(backend: Backend) -> None:
    logits, target = on(backend, STRONG), on(backend, WEAK)
    out = losses.cosine_loss(logits, target, temperature=0.7)
    p, q = [softmax(row) for row in STRONG], [softmax(row, 0.7) for row in WEAK]
    loss = sum(1 - cosine(a, b) for a, b in zip(p, q, strict=True)) / 2
    assert out.loss.item() == pytest.approx(loss, rel=10 * backend.rel)
    assert out.mask_rate.item() == 1.0
    expected = torch.zeros(2, 3, dtype=DOUBLE)
    for i in range(2):
        pp, qq = dot(p[i], p[i]), dot(q[i], q[i])
        for c in range(3):
            change = q[i][c] / math.sqrt(pp * qq) - cosine(p[i], q[i]) * p[i][c] / pp
            expected[i, c] = -p[i][c] * change / 2
    same(gradient_of(out.loss, logits), expected, backend)
    masked = losses.cosine_loss(logits, target, temperature=0.7, threshold=0.6)
    assert masked.loss.item() == pytest.approx((1 - cosine(p[0], q[0])) / 2, rel=10 * backend.rel)
    assert masked.mask_rate.item() == 0.5  # the loss is over ALL rows
    assert not gradient_of(masked.loss, logits)[1].any()
    if not backend.is_fused:
        assert torch.autograd.gradcheck(
            lambda x: losses.cosine_loss(x, target, temperature=0.7).loss, (logits,)
        )


@pytest.mark.parametrize("width", [3, 9000])
def test_cosine_of_equals_and_of_opposites(width: int, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, width, dtype=backend.dtype, generator=generator).to(backend.device)
    assert losses.cosine_loss(x, x + 3.0).loss.item() == pytest.approx(0.0, abs=backend.rel)
    sure = torch.full((2, width), -math.inf, dtype=backend.dtype, device=x.device)
    sure[0, 0] = sure[1, width - 1] = 0.0
    leaf = sure[:1].clone().requires_grad_()
    apart = losses.cosine_loss(leaf, sure[1:]).loss
    assert apart.item() == 1.0
    assert not gradient_of(apart, leaf).any()


def test_exact_feedback(backend: Backend) -> None:
    logits, direction = on(backend, STRONG), on(backend, DIRECTION)
    weight = torch.tensor(0.375, device=logits.device)
    out = losses.exact_feedback(logits, direction, weight=weight)
    q = [softmax(row) for row in STRONG]
    means = [dot(a, b) for a, b in zip(q, DIRECTION, strict=True)]
    k = 0.375 / 2
    assert out.item() == pytest.approx(k * sum(means), rel=backend.rel)
    expected = [[k * q[i][c] * (DIRECTION[i][c] - means[i]) for c in range(3)] for i in range(2)]
    same(gradient_of(out, logits), expected, backend)
    if not backend.is_fused:
        assert torch.autograd.gradcheck(
            lambda x: losses.exact_feedback(x, direction, weight=-0.4), (logits,)
        )


@pytest.mark.parametrize("width", [6, 9000])
def test_a_direction_equal_for_all_classes_has_no_gradient(width: int, backend: Backend) -> None:
    logits = torch.zeros(2, width, dtype=backend.dtype, device=backend.device)
    logits[:, 1] = 3.0
    leaf, direction = logits.requires_grad_(), torch.full_like(logits, 2.0)
    out = losses.exact_feedback(leaf, direction, weight=0.5)
    assert out.item() == pytest.approx(1.0, rel=backend.rel)
    assert gradient_of(out, leaf).abs().max().item() < backend.rel


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_exact_feedback_is_the_meta_gradient_of_a_step(smoothing: float, masked: bool) -> None:
    """Through a linear student's SGD step in double precision, where autograd can follow it.

    A mask of the student's rows, and smoothing of its labels, multiply rows of the direction.
    """
    generator = torch.Generator().manual_seed(1)
    images, labeled, weights = (
        torch.randn(*shape, dtype=DOUBLE, generator=generator) for shape in [(6, 5), (4, 5), (5, 3)]
    )
    mask = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0] if masked else [1.0] * 6, dtype=DOUBLE)
    teacher = torch.randn(6, 3, dtype=DOUBLE, generator=generator).requires_grad_()

    student = weights.clone().requires_grad_()
    q = (1.0 - smoothing) * teacher.softmax(-1) + smoothing / 3
    loss = -(mask[:, None] * q * (images @ student).log_softmax(-1)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    moved = student - 0.7 * gradient
    labeled_loss = torch.nn.functional.cross_entropy(labeled @ moved, torch.tensor([0, 1, 2, 1]))
    (exact,) = torch.autograd.grad(labeled_loss, teacher, retain_graph=True)
    (v,) = torch.autograd.grad(labeled_loss, moved)

    # The derivative of log softmax(images @ weights) along v, by hand.
    change = images @ v
    direction = change - ((images @ weights).softmax(-1) * change).sum(-1, keepdim=True)
    share = (1.0 - smoothing) * mask[:, None]
    ours = losses.exact_feedback(teacher, share * direction, weight=0.7)
    torch.testing.assert_close(gradient_of(ours, teacher), exact, rtol=1e-10, atol=1e-14)
    assert exact.abs().amax(-1).gt(1e-4).tolist() == mask.gt(0).tolist()


def test_pseudo_labels(backend: Backend) -> None:
    out = losses.pseudo_labels(on(backend, WEAK))
    q = [softmax(row) for row in WEAK]
    assert out.label.tolist() == [0, 0]
    assert out.confidence.tolist() == pytest.approx([max(row) for row in q])
    entropy = [-sum(p * math.log(p) for p in row) for row in q]
    assert out.entropy.tolist() == pytest.approx(entropy, rel=1e-5)


def test_uniform_numbers_sample_the_label(backend: Backend) -> None:
    row = [0.0, math.log(2.0), math.log(5.0), -math.inf]
    weak = torch.tensor([row], device=backend.device).expand(9, 4)
    numbers = [0.0, 0.12, 0.13, 0.3, 0.37, 0.38, 0.9, 1 - 2**-24, 1.0]
    uniforms = torch.tensor(numbers, device=weak.device)
    # p is 1/8, 2/8, 5/8, 0: the edges lie at 0.125 and 0.375.
    out = losses.pseudo_labels(weak, uniforms=uniforms)
    assert out.label.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    first = losses.pseudo_labels(weak.flip(-1), uniforms=uniforms).label
    assert first.tolist() == [1, 1, 1, 1, 1, 1, 3, 3, 3]  # never the impossible class 0


def test_feedback_by_hand() -> None:
    old, new = torch.tensor(2.0), torch.tensor(1.5)
    assert losses.mpl_feedback(old, new).item() == 0.5
    average = torch.tensor(0.1)
    h = losses.mpl_feedback(old, new, average, momentum=0.75)
    assert average.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert h.item() == pytest.approx(0.5 - 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_feedback_is_float32_for_every_type_of_losses(dtype: torch.dtype) -> None:
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
def test_feedback_that_is_not_finite_is_returned_and_not_averaged(
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


def test_feedback_of_a_student_that_did_not_move_is_zero(backend: Backend) -> None:
    target = torch.tensor(TARGET, device=backend.device)
    old, new = (losses.smoothed_ce(on(backend, LABELED), target).loss for _ in range(2))
    assert losses.mpl_feedback(old, new).item() == 0.0
