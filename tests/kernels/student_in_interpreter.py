"""The student's kernel against the float64 reference, on Triton's interpreter (TRITON_INTERPRET=1).

Not collected by itself: Triton reads that variable when a kernel is decorated, so this needs a
process of its own. `test_triton.py` starts it.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mpl_fast.kernels import reference
from mpl_fast.kernels.fused_student import student_loss, student_loss_and_grad
from mpl_fast.kernels.outputs import StudentOut
from tests.kernels.interpreted_rows import (
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

SCALE = torch.tensor(3.0)


class Case(NamedTuple):
    """What a student's loss is given."""

    logits: Tensor
    pseudo: Tensor
    target: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0
    weight: Tensor | None = None
    num_classes: int | None = None

    def loss(self, logits: Tensor) -> StudentOut:
        return student_loss(logits, *self[1:3], **self.options())  # type: ignore[arg-type]

    def expected(self, logits: Tensor) -> StudentOut:
        return reference.student_loss(logits, *self[1:3], **self.options())  # type: ignore[arg-type]

    def both(self, grad_scale: Tensor | None = None) -> tuple[StudentOut, Tensor]:
        return student_loss_and_grad(
            self.logits,
            self.pseudo,
            self.target,
            grad_scale=grad_scale,
            **self.options(),  # type: ignore[arg-type]
        )

    def options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._fields[3:]}


def compare(case: Case) -> StudentOut:
    """Checks value, statistics and gradient, in two launches and in one, against float64."""
    x = case.logits.detach().requires_grad_()
    oracle = case.logits.detach().double().requires_grad_()
    out, expected = case.loss(x), case.expected(oracle)
    for name, got in out._asdict().items():
        assert_value(got, getattr(expected, name), name)
        assert got.requires_grad == (name == "loss")
    (gradient,) = torch.autograd.grad(SCALE * out.loss, x)
    (wanted,) = torch.autograd.grad(SCALE * expected.loss, oracle)
    assert_gradient(gradient, wanted)
    at_once, scaled = case.both(SCALE)
    assert torch.equal(scaled, gradient)
    assert [value.item() for value in at_once] == [value.item() for value in out]
    return out


# Each setting differs from the next in every option: soft, weighted, smoothing, temperature, and
# how much wider than the classes a row is.
SETTINGS = [
    (False, False, 0.0, 1.0, 0),
    (False, True, 0.1, 1.0, 3),
    (True, False, 0.0, 1.0, 8),
    (True, True, 0.15, 0.4, 0),
]


@pytest.mark.parametrize(("classes", "dtype"), KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_agrees_with_float64(
    classes: int, dtype: torch.dtype, setting: tuple[bool, bool, float, float, int]
) -> None:
    soft, weighted, smoothing, temperature, padding = setting
    case = Case(
        rows(2 + 2, classes, dtype, padding),
        rows(2, classes, dtype, padding) if soft else torch.tensor([0, classes - 1]),
        torch.tensor([-100, classes - 1]),
        smoothing,
        temperature,
        torch.tensor([0.0, 0.5]) if weighted else None,
        classes,
    )
    out = compare(case)
    assert out.loss.item() > 0 < out.labeled_ce.item()
    _, gradient = case.both()
    assert (gradient[:2] == 0).all()
    assert (gradient[:, classes:] == 0).all()
    assert ((gradient[2:] != 0).any(1) == (True if case.weight is None else case.weight > 0)).all()
    if dtype == torch.float32:
        assert gradient.double().sum(1).abs().max().item() < 1e-6


@pytest.mark.parametrize(("labeled", "unlabeled"), [(3, 0), (0, 5), (1, 1), (0, 0)])
@pytest.mark.parametrize("soft", [False, True])
def test_rows_of_a_kind_may_be_missing(labeled: int, unlabeled: int, soft: bool) -> None:
    x = rows(labeled + unlabeled, 10, torch.float32)
    pseudo = rows(9, 10, torch.float32)[:unlabeled] if soft else labels(unlabeled, 10)
    compare(Case(x, pseudo, labels(labeled, 10)))
    if labeled == 0:
        out = compare(Case(x, pseudo, None))
        assert out.labeled_ce.item() == out.labeled_accuracy.item() == 0.0


def test_strided_rows_are_read_where_they_lie() -> None:
    wide = rows(4, 24, torch.float32)
    for view in (wide[:, 3:13], wide[:, ::4], wide[:, :5].T):
        assert not view.is_contiguous()
        compare(Case(view, labels(len(view) - 1, 4), labels(1, 4)))
        compare(Case(view.contiguous(), view[1:], labels(1, 4)))
    weight = torch.tensor([[1.0, 9.0], [0.5, 9.0]])[:, 0]
    compare(Case(wide[:2], labels(2, 7), None, weight=weight))


@pytest.mark.parametrize("soft", [False, True])
def test_without_a_scale_the_gradient_is_that_of_the_loss(soft: bool) -> None:
    pseudo = rows(3, 10, torch.float32) if soft else labels(3, 10)
    case = Case(rows(4, 10, torch.float32), pseudo, labels(1, 10))
    x = case.logits.double().requires_grad_()
    (wanted,) = torch.autograd.grad(case.expected(x).loss, x)
    assert_gradient(case.both()[1], wanted)


def test_a_teacher_of_another_type() -> None:
    soft = rows(3, 10, torch.float32).to(torch.bfloat16)
    compare(Case(rows(4, 10, torch.float32), soft, labels(1, 10)))


@pytest.mark.parametrize("soft", [False, True])
def test_small_16_bit_gradients_survive_under_a_loss_scale(soft: bool) -> None:
    logits = rows(4, 1000, torch.float16)
    weight = torch.full((4,), 1e-4)
    pseudo = rows(4, 1000, torch.float16).flip(0) if soft else labels(4, 1000)
    case = Case(logits, pseudo, weight=weight)
    scale = torch.tensor(2.0**16)
    x, oracle = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(scale * case.loss(x).loss, x)
    (wanted,) = torch.autograd.grad(scale * case.expected(oracle).loss, oracle)
    assert_gradient(gradient, wanted)
    assert_gradient(case.both(scale)[1], wanted)
    (unscaled,) = torch.autograd.grad(case.loss(x).loss, x)
    assert (unscaled == 0).sum() > (gradient == 0).sum()


def test_labeled_accuracy_takes_the_first_of_equals() -> None:
    for width in (10, 9000):
        logits = torch.zeros(3, width)
        logits[:, [4, 7, width - 1]] = 2.0
        out = compare(Case(logits, labels(1, width), torch.tensor([4, 7])))
        assert out.labeled_accuracy.item() == 0.5


@pytest.mark.parametrize("bad", [-1, 10, 1 << 40, -(1 << 40), -100])
def test_labels_out_of_range_are_nan(bad: int) -> None:
    logits = rows(3, 10, torch.float32)
    out, gradient = Case(logits, torch.tensor([3, bad]), torch.tensor([1])).both()
    assert out.loss.isnan()
    assert out.labeled_ce.isfinite()
    assert gradient.isnan().any(1).tolist() == [False, False, True]
    out, gradient = Case(logits, torch.tensor([3, 4]), torch.tensor([bad])).both()
    assert out.loss.isfinite()
    assert out.labeled_ce.isnan() if bad != -100 else out.labeled_ce.item() == 0.0
    assert out.labeled_accuracy.item() == 0.0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("width", [6, 9000])  # in one block, and in a loop
@pytest.mark.parametrize(
    "poison", [math.nan, -math.inf, math.inf], ids=["nan", "minus_inf", "plus_inf"]
)
@pytest.mark.parametrize("row", [0, 1, 2], ids=["labeled", "strong", "teacher"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_infinities_and_nan_as_pytorch(
    width: int, poison: float, row: int, everywhere: bool
) -> None:
    three = rows(3, width, torch.float32)
    columns = slice(1, 2)
    if everywhere:  # of NaN every other one: the interpreter finds no maximum among NaN alone
        columns = slice(None, None, 2 if math.isnan(poison) else None)
    three[row, columns] = poison
    soft, hit, missed = three[2:], torch.tensor([1]), torch.tensor([2])
    cases = [(soft, 0.0), (soft, 0.1), (hit, 0.0), (missed, 0.0), (missed, 0.1)]
    # Each row meets what it can make a difference to.
    for pseudo, smoothing in {0: cases[2:3], 1: cases, 2: cases[:2]}[row]:
        case = Case(three[:2], pseudo, torch.tensor([3]), smoothing)
        x, oracle = three[:2].clone().requires_grad_(), three[:2].double().requires_grad_()
        out, expected = case.loss(x), case.expected(oracle)
        assert_value(out.loss, expected.loss)
        assert_value(out.labeled_ce, expected.labeled_ce)
        (gradient,) = torch.autograd.grad(out.loss, x)
        (wanted,) = torch.autograd.grad(expected.loss, oracle)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("width", [4, 9000])
@pytest.mark.parametrize("temperature", [1e-8, 1e-38])
def test_a_tiny_temperature_is_the_arg_max(width: int, temperature: float) -> None:
    strong, teacher = rows(1, width, torch.float32), torch.zeros(1, width)
    teacher[0, width - 2] = 50.0
    soft = compare(Case(strong, teacher, temperature=temperature))
    hard = compare(Case(strong, torch.tensor([width - 2])))
    assert soft.loss.item() == pytest.approx(hard.loss.item(), rel=1e-6)


def test_huge_logits() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -2e38]])
    compare(Case(logits, torch.tensor([0, 2])))
    compare(Case(logits, logits.clone()))


def test_nothing_flows_into_teacher_and_weight() -> None:
    logits, teacher = rows(2, 10, torch.float32), rows(2, 10, torch.float32).requires_grad_()
    weight = torch.ones(2, requires_grad=True)
    assert not student_loss(logits, teacher, weight=weight).loss.requires_grad
    loss = student_loss(logits.requires_grad_(), teacher, weight=weight).loss
    loss.backward()
    assert logits.grad is not None
    assert teacher.grad is None is weight.grad


def test_two_derivatives_are_refused() -> None:
    logits = rows(2, 10, torch.float32).requires_grad_()
    loss = student_loss(logits, labels(2, 10)).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_logits_changed_before_the_backward_pass_are_noticed() -> None:
    leaf = rows(2, 10, torch.float32).requires_grad_()
    logits = leaf * 1.0
    loss = student_loss(logits, labels(2, 10)).loss
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_row_offsets_do_not_overflow() -> None:
    """Rows 2**30 elements apart: the third starts past 2**31."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16)  # only touched pages are real
    logits = memory.as_strided((3, 16), (pitch, 1))
    logits.copy_(rows(3, 16, torch.bfloat16))
    near = logits.contiguous()
    for pseudo in (labels(3, 16), logits):
        out, expected = student_loss(logits, pseudo), reference.student_loss(near, pseudo)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("stats", "grad"), [(True, False), (True, True), (False, True)])
def test_the_op_is_what_it_says(soft: bool, stats: bool, grad: bool) -> None:
    pseudo = rows(3, 10, torch.float32) if soft else labels(3, 10)
    x, weight = rows(5, 10, torch.float32), torch.ones(3)
    saved = torch.ones(4 if soft else 2, 3)
    torch.library.opcheck(
        torch.ops.mpl_fast.student.default,
        (x, pseudo, labels(2, 10), weight, SCALE, saved, True, True, stats, grad, 0.1, 0.7, 10),
    )


@pytest.mark.parametrize("soft", [False, True])
def test_compiles_into_one_graph_for_every_batch(soft: bool) -> None:
    """No break, nothing compiled for another batch, and the same numbers as without."""
    counter = CompileCounterWithBackend("aot_eager")
    compilations = []

    def step(logits: Tensor, pseudo: Tensor, target: Tensor, weight: Tensor) -> StudentOut:
        out = student_loss(logits, pseudo, target, label_smoothing=0.1, weight=weight)
        return out._replace(loss=out.loss * 2.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for unlabeled in (3, 5, 8):
        logits = rows(2 + unlabeled, 10, torch.float32)
        pseudo = rows(unlabeled, 10, torch.float32) if soft else labels(unlabeled, 10)
        weight = torch.rand(unlabeled)
        gradients = []
        for function in (step, compiled):
            x = logits.clone().requires_grad_()
            out = function(x, pseudo, labels(2, 10), weight)
            out.loss.backward()
            gradients.append((*(value.detach() for value in out), x.grad))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


def test_loss_and_gradient_compile_into_one_graph() -> None:
    compiled = torch.compile(student_loss_and_grad, fullgraph=True, backend="aot_eager")
    arguments = rows(5, 10, torch.float32), labels(3, 10), labels(2, 10)
    got, wanted = (f(*arguments, grad_scale=SCALE) for f in (compiled, student_loss_and_grad))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
