"""The definition, in float64: values by hand, finite differences, a step that autograd follows.

`test_contract.py` compares the kernels with it.
"""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels import reference
from mpl_fast.kernels.outputs import Pseudo, TeacherInputs
from tests.kernels.cases import (
    DOUBLE,
    EVERY_LOSS,
    EVERY_TERMS,
    LOSSES,
    TERMS,
    UPSTREAM,
    Arguments,
    named,
)

# Rows of logits, two of each kind.
LABELED = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]
WEAK = [[2.0, 0.0, -1.0], [0.3, 0.2, 0.1]]  # sure of class 0, unsure
STRONG = [[0.5, 1.0, -0.5], [1.5, 0.0, -2.0]]  # arg-max 1 and 0
TARGET, HARD, TRUTH = [2, 1], [1, 2], [0, 1]
WEIGHT = [1.0, 0.25]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def entropy(q: list[float]) -> float:
    return -sum(p * math.log(p) for p in q)


def cross_entropy(
    targets: list[list[float]], rows: list[list[float]], smoothing: float = 0.0
) -> list[float]:
    """Of each row."""
    return [
        -sum(
            ((1 - smoothing) * q + smoothing / 3) * math.log(p) for q, p in zip(*pair, strict=True)
        )
        for pair in zip(targets, map(softmax, rows), strict=True)
    ]


def one_hot(labels: list[int]) -> list[list[float]]:
    return [[float(c == label) for c in range(3)] for label in labels]


def mean(values: Iterable[float]) -> float:
    first, second = values
    return (first + second) / 2


SOFT, SHARP = [softmax(row) for row in WEAK], [softmax(row, 0.7) for row in WEAK]
P = [softmax(row) for row in STRONG]
COSINES = [dot(p, q) / math.sqrt(dot(p, p) * dot(q, q)) for p, q in zip(P, SHARP, strict=True)]
STUDENT = {
    "hard": dot(WEIGHT, cross_entropy(one_hot(HARD), STRONG, 0.1)) / 2,
    "soft": dot(WEIGHT, cross_entropy(SOFT, STRONG, 0.1)) / 2,
}
X = torch.tensor(STRONG, dtype=DOUBLE)
ARGUMENTS = Arguments(
    label=torch.tensor(HARD),
    other=torch.tensor(WEAK, dtype=DOUBLE),
    weight=torch.tensor(WEIGHT, dtype=DOUBLE),
    smoothing=0.1,
    temperature=0.7,
    feedback=0.375,
)
BY_HAND: dict[str, dict[str, Any]] = {
    "smoothed_ce": {"loss": mean(cross_entropy(one_hot(HARD), STRONG, 0.1)), "accuracy": 0.5},
    **{f"student {kind}": {"loss": loss} for kind, loss in STUDENT.items()},
    **{f"student {kind}, one pass": {"loss": loss} for kind, loss in STUDENT.items()},
    "cosine": {"loss": 1 - mean(COSINES), "mask_rate": 1.0},
    "exact": {"loss": 0.375 * mean(map(dot, WEAK, P))},
    "pseudo": {
        "label": [1, 0],
        "confidence": [max(p) for p in P],
        "entropy": [entropy(p) for p in P],
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name: str) -> None:
    outputs, _ = LOSSES[name](X, ARGUMENTS)
    assert outputs.keys() == BY_HAND[name].keys()
    for key, value in BY_HAND[name].items():
        rel = 1e-9 if outputs[key].dtype == DOUBLE else 1e-6
        assert outputs[key].tolist() == pytest.approx(value, rel=rel)


@EVERY_TERMS
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    leaf = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: named(TERMS[name](x, ARGUMENTS))["loss"], (leaf,))
    if once := LOSSES.get(f"{name}, one pass"):
        gradient = LOSSES[name](X, ARGUMENTS).gradient
        torch.testing.assert_close(UPSTREAM * once(X, ARGUMENTS).gradient, gradient)


def teacher_inputs(logits: Tensor, feedback: float, pseudo: Pseudo) -> TeacherInputs:
    target, truth = torch.tensor(TARGET), torch.tensor(TRUTH)
    return TeacherInputs(logits, target, 2, 8.0, feedback, 0.7, 0.6, 0.1, pseudo, truth)


@pytest.mark.parametrize("feedback", [0.7, 0.0, -0.7])
@pytest.mark.parametrize(
    ("pseudo", "label"), [("weak", [0, 0]), ("strong", [1, 0]), (torch.tensor([2, 1]), [2, 1])]
)
def test_teacher(pseudo: Pseudo, label: list[int], feedback: float) -> None:
    """Weak rows are constants to the gradient, and not to the value."""
    logits = torch.tensor(LABELED + WEAK + STRONG, dtype=DOUBLE, requires_grad=True)
    inputs = teacher_inputs(logits, feedback, pseudo)
    out, gradient = losses.teacher_loss_and_grad(**inputs._asdict())
    assert max(SHARP[0]) > 0.6 > max(SHARP[1])  # the mask keeps the first pair alone
    wanted = {
        "sup": mean(cross_entropy(one_hot(TARGET), LABELED, 0.1)),
        "uda": cross_entropy(SHARP, STRONG)[0] / 2,  # over ALL rows, kept or not
        "mpl": mean(cross_entropy(one_hot(label), STRONG)),
        "mask_rate": 0.5,
        "confidence": mean(map(max, SHARP)),
        "entropy": mean(map(entropy, SHARP)),
        "pseudo_accuracy": mean(map(int.__eq__, label, TRUTH)),
        "label": label,
    }
    wanted["loss"] = wanted["sup"] + 8.0 * wanted["uda"] + feedback * wanted["mpl"]  # type: ignore[operator]
    assert wanted.keys() == {*out._fields}
    for key, value in wanted.items():
        found = getattr(out, key)
        rel = 1e-9 if found.dtype == DOUBLE else 1e-6
        assert found.tolist() == pytest.approx(value, rel=rel), key
    without, _ = losses.teacher_loss_and_grad(**inputs._replace(truth=None)._asdict())
    assert without.pseudo_accuracy.item() == 0.0

    labeled, weak, strong = (x.detach() for x in logits.split(2))

    def terms(labeled: Tensor, strong: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat((labeled, weak, strong))
        return reference.teacher_loss(teacher_inputs(rows, feedback, pseudo))[:4]

    assert torch.autograd.gradcheck(terms, (labeled.requires_grad_(), strong.requires_grad_()))
    taped = reference.teacher_loss(inputs)
    carrying = [key for key, value in taped._asdict().items() if value.requires_grad]
    assert carrying == ["loss", "sup", "uda", "mpl"]
    assert all(map(torch.equal, out, taped))
    (whole,) = torch.autograd.grad(taped.loss, logits)
    torch.testing.assert_close(gradient, whole)
    assert not gradient[2:4].any()
    logits.backward(gradient)
    assert logits.grad is not None and torch.equal(logits.grad, gradient)


# Differences of multiples of 2**-8 lose no bits.
multiples = st.integers(-20 * 2**8, 20 * 2**8).map(lambda i: i / 2**8)
three_rows_of_four = st.lists(st.lists(multiples, min_size=4, max_size=4), min_size=3, max_size=3)
ORDER = [2, 0, 3, 1]


@EVERY_LOSS
@settings(max_examples=30, deadline=None)
@given(rows=three_rows_of_four, shift=st.sampled_from([0.5, -1.0, 1024.0]))
def test_shifts_and_the_order_of_classes_do_not_matter(
    name: str, rows: list[list[float]], shift: float
) -> None:
    x = torch.tensor(rows, dtype=DOUBLE)
    other = x.flip(0).roll(1, -1)
    a = Arguments(other.argmax(-1), other, None, 0.1, 0.5, uda_weight=2.0, feedback=0.3)
    found, shifted = LOSSES[name](x, a), LOSSES[name](x + shift, a)
    moved_label = torch.tensor([ORDER.index(i) for i in range(4)])[a.label]
    moved = LOSSES[name](x[:, ORDER], a._replace(label=moved_label, other=other[:, ORDER]))
    for key, value in found.outputs.items():
        torch.testing.assert_close(shifted.outputs[key], value, rtol=1e-10, atol=1e-10)
        if key not in ("label", "accuracy"):  # which of equals is first depends on the order
            rel = 1e-10 if value.dtype == DOUBLE else 1e-5
            torch.testing.assert_close(moved.outputs[key], value, rtol=rel, atol=1e-10)
    torch.testing.assert_close(shifted.gradient, found.gradient, rtol=1e-10, atol=1e-10)
    if name != "pseudo":
        assert found.gradient.sum(-1).abs().max().item() < 1e-12
        torch.testing.assert_close(moved.gradient, found.gradient[:, ORDER], rtol=1e-10, atol=1e-10)
    if name == "cosine":
        assert -1e-12 <= found.outputs["loss"].item() <= 1.0 + 1e-12


def test_a_soft_label_of_ones_own_has_no_gradient() -> None:
    """The feedback term of the official code is flat: CE(sg softmax(z), z) has gradient 0 in z."""
    outputs, gradient = LOSSES["student soft"](X, Arguments(torch.tensor(HARD), X))
    assert outputs["loss"].item() > 0.5
    assert gradient.abs().max().item() < 1e-15


def test_impossible_classes_add_nothing() -> None:
    x, q = ([[row[0], -math.inf, *row[1:]] for row in kind] for kind in (STRONG, WEAK))
    a = ARGUMENTS._replace(other=torch.tensor(q, dtype=DOUBLE), smoothing=0.0)
    for name in ("student soft", "cosine"):
        outputs, gradient = LOSSES[name](torch.tensor(x, dtype=DOUBLE), a)
        wanted, without = LOSSES[name](X, ARGUMENTS._replace(smoothing=0.0))
        torch.testing.assert_close(outputs["loss"], wanted["loss"])
        torch.testing.assert_close(gradient[:, [0, 2, 3]], without)
        assert not gradient[:, 1].any()


def test_a_masked_cosine_loss_is_a_mean_over_all_rows() -> None:
    outputs, gradient = LOSSES["cosine"](X, ARGUMENTS._replace(threshold=0.6))
    assert outputs["loss"].item() == pytest.approx((1 - COSINES[0]) / 2)
    assert outputs["mask_rate"].item() == 0.5
    assert gradient.any(1).tolist() == [True, False]


def test_cosine_of_equals_and_of_opposites() -> None:
    sure = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=DOUBLE)
    for target, loss in ((sure + 3.0, 0.0), (sure.flip(0), 1.0)):
        outputs, gradient = LOSSES["cosine"](sure, Arguments(torch.arange(2), target))
        assert outputs["loss"].item() == loss and not gradient.any()


def test_a_direction_equal_for_all_classes_has_no_gradient() -> None:
    outputs, gradient = LOSSES["exact"](X, ARGUMENTS._replace(other=torch.full_like(X, 2.0)))
    assert outputs["loss"].item() == pytest.approx(0.75)
    assert gradient.abs().max().item() < 1e-15


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
    (found,) = torch.autograd.grad(ours, teacher)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-14)
    assert exact.abs().amax(-1).gt(1e-4).tolist() == mask.gt(0).tolist()


def test_uniform_numbers_sample_the_label() -> None:
    row = [0.0, math.log(2.0), math.log(5.0), -math.inf]
    weak = torch.tensor([row]).expand(9, 4)
    # p is 1/8, 2/8, 5/8, 0: the edges lie at 0.125 and 0.375.
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.3, 0.37, 0.38, 0.9, 1 - 2**-24, 1.0])
    out = losses.pseudo_labels(weak, uniforms=uniforms)
    assert out.label.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    first = losses.pseudo_labels(weak.flip(-1), uniforms=uniforms).label
    assert first.tolist() == [1, 1, 1, 1, 1, 1, 3, 3, 3]  # never the impossible class 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_feedback_by_hand(dtype: torch.dtype) -> None:
    """In float32 for every type of losses."""
    old, new = torch.tensor(2.0, dtype=dtype, requires_grad=True), torch.tensor(1.5, dtype=dtype)
    average = torch.tensor(0.1)
    plain, h = losses.mpl_feedback(old, new), losses.mpl_feedback(old, new, average, momentum=0.75)
    assert average.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert [plain.item(), h.item()] == pytest.approx([0.5, 0.5 - 0.2])
    for found in (plain, h):
        assert found.dtype == torch.float32 and not found.requires_grad


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
