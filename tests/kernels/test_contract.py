"""What every loss satisfies in plain PyTorch, on Triton's interpreter and on a GPU.

The oracle is the definition in float64, which `test_definition.py` tests.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels.outputs import Scalar
from tests.kernels.cases import (
    CLASSES,
    EVERY_LOSS,
    EVERY_TERMS,
    FLOAT,
    INTERPRETED,
    LOSSES,
    TERMS,
    UPSTREAM,
    WIDTHS,
    Answer,
    Arguments,
    assert_gradient,
    assert_same,
    differentiated,
    flat,
    labels,
    named,
    oracle,
    problem,
    rows,
    tolerance,
)

# inf * 0 and the like are meant; the interpreter runs on numpy, which warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ONE_PASS = [name for name in LOSSES if name not in TERMS]
POISONS = {"nan": math.nan, "minus_inf": -math.inf, "plus_inf": math.inf}
# Each setting differs from the next in every option.
SETTINGS: list[dict[str, Any]] = [
    {"feedback": 0.3},
    {"smoothing": 0.1, "temperature": 0.7, "threshold": 0.6, "uda_weight": 8.0, "feedback": -0.2},
    {"smoothing": 0.15, "temperature": 0.05, "threshold": 0.9, "uda_weight": 0.5, "feedback": 0.0},
]
# The interpreter is slow: most widths get one setting there, and everywhere 16-bit types, which
# differ by a load and a store.
CASES = [
    (classes, FLOAT, setting)
    for classes in CLASSES
    for setting in range(3)
    if not INTERPRETED or classes in (10, 9000) or setting == classes % 3
]
CASES += [(2, torch.bfloat16, 0), (1000, torch.bfloat16, 1), (21841, torch.bfloat16, 2)]
CASES += [(10, torch.float16, 0), (8192, torch.float16, 1)]


def check(name: str, x: Tensor, a: Arguments) -> Answer:
    """Compares an answer with float64, and returns it."""
    answer = LOSSES[name](x, a)
    assert_same(answer, oracle(name, x, a))
    assert answer.gradient.dtype == x.dtype
    return answer


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors contain NaN and the largest integers, not the zeros of a fresh process."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_LOSS
@pytest.mark.parametrize(("classes", "dtype", "setting"), CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_agrees_with_float64(
    name: str, classes: int, dtype: torch.dtype, setting: int, device: str
) -> None:
    count = 6 if name == "teacher" and classes < 5000 else 3
    x, a = problem(device, count, classes, dtype)
    weights = torch.tensor([0.0, 0.5, 1.0] * 2, device=x.device)[:count]
    weight = weights if setting else None
    a = a._replace(**SETTINGS[setting], weight=weight)
    feedback = torch.tensor(a.feedback, device=x.device) if setting else a.feedback
    a = a._replace(feedback=feedback, pseudo=("weak", "strong", "given")[setting])
    a.label[0] = x[0].argmax()  # one hit
    outputs, gradient = check(name, x, a)
    if name == "pseudo":
        return
    if dtype == FLOAT:
        rounding = 2 * tolerance(gradient) * max(gradient.norm().item(), 1.0)
        assert gradient.double().sum(1).abs().max().item() < rounding
    if name == "teacher":
        assert outputs["sup"].item() > 0 < outputs["mpl"].item()
        labeled, weak, _ = gradient.split(count // 3)
        assert labeled.any(1).all() and not weak.any()  # weak rows are constants
    elif name.startswith("student") and weight is not None:
        assert gradient.any(1).tolist() == weight.bool().tolist()
    elif name != "exact" or a.feedback != 0.0:
        assert gradient.any()


@EVERY_LOSS
def test_strided_rows(name: str, device: str) -> None:
    even, odd = rows(3, 40).to(device), rows(3, 41).to(device)
    spread = labels(3, 3).repeat_interleave(2)[::2].to(device)
    weight = torch.tensor([1.0, 9.0, 0.5, 9.0, 2.0, 9.0], device=device)[::2]
    for view in (even[:, 3:13], odd[:, 3:13], even[:, ::4], odd[:, :3].T):
        assert not view.is_contiguous()
        other = rows(4, view.shape[1]).to(device)[1:]
        a = Arguments(spread, other, weight, smoothing=0.1)
        check(name, view, a)
        check(name, other, a._replace(other=view))


@EVERY_LOSS
def test_row_offsets_do_not_overflow(name: str, device: str) -> None:
    """Rows 2**30 elements apart: the third starts past 2**31."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((3, 16), (pitch, 1))  # only touched pages are real
    x, a = problem(device, 3, 16, torch.bfloat16)
    check(name, far.copy_(x), a)
    check(name, x, a._replace(other=far))
    if name == "teacher":
        check(name, far, a._replace(unlabeled=0))


@EVERY_LOSS
def test_other_logits_may_have_another_type(name: str, device: str) -> None:
    x, a = problem(device, 3, 10)
    check(name, x, a._replace(other=a.other.bfloat16()))


@EVERY_LOSS
def test_no_rows(name: str, device: str) -> None:
    x, a = problem(device, 0, 10)
    outputs, gradient = LOSSES[name](x, a)
    for key, value in outputs.items():
        assert value.shape == (0,) if value.dim() else value.item() == 0.0, key
    assert gradient.shape == (0, 10)
    assert losses.pseudo_labels(x, uniforms=x[:, 0]).label.shape == (0,)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(3, 0), (0, 5), (1, 1)])
def test_the_teacher_may_have_rows_of_one_kind(labeled: int, unlabeled: int, device: str) -> None:
    x, a = problem(device, labeled + 2 * unlabeled, 10)
    outputs, _ = check("teacher", x, a._replace(unlabeled=unlabeled))
    for kind, keys in ((labeled, ["sup"]), (unlabeled, ["uda", "mpl", "entropy", "confidence"])):
        for key in keys:
            assert outputs[key].item() > 0 if kind else outputs[key].item() == 0


# Which of three rows get bad numbers (0, 1, 2: labeled, weak and strong to the teacher; -1: a row
# of the other logits), and the arguments for which that makes a difference.
CE: list[dict[str, Any]] = [
    {"column": 1},
    {"column": 2},
    {"column": 2, "smoothing": 0.1},
]  # the label's
MASK: list[dict[str, Any]] = [{"threshold": 0.0}, {"threshold": 1.5}]
EITHER_OR_BOTH = [(0,), (-1,), (0, -1)]
BAD_ROWS: dict[str, tuple[list[tuple[int, ...]], list[dict[str, Any]]]] = {
    "smoothed_ce": ([(0,)], CE),
    "student hard, one pass": ([(0,)], CE),
    "student soft": (EITHER_OR_BOTH, CE[1:]),
    "student soft, one pass": (EITHER_OR_BOTH, CE[1:]),
    "teacher": ([(0,), (1,), (2,), (1, 2)], [*CE[:2], CE[2] | MASK[1]]),
    "cosine": (EITHER_OR_BOTH, MASK),
    "exact": ([(0,), (-1,)], [{}]),
    "pseudo": ([(0,)], [{}]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_infinities_and_nan(
    name: str, width: int, poison: str, everywhere: bool, device: str
) -> None:
    """As in PyTorch, at a label's column and beside it."""
    # Of NaN every other one: the interpreter finds no maximum among NaN alone.
    columns = slice(None, None, 2 if poison == "nan" else None) if everywhere else slice(1, 2)
    bad_rows, settings = BAD_ROWS[name]
    for bad in bad_rows:
        x, a = problem(device, 3 if name == "teacher" else 1, width)
        for row in bad:
            (a.other[0] if row == -1 else x[row])[columns] = POISONS[poison]
        for setting in settings:
            options = {key: value for key, value in setting.items() if key != "column"}
            label = torch.full_like(a.label, setting.get("column", 2))
            given = a._replace(label=label, **options)
            got, wanted = LOSSES[name](x, given), oracle(name, x, given)
            if poison == "nan":  # such a row has no arg-max
                for key in {"label", "accuracy"} & {*got.outputs}:
                    assert 0 <= int(got.outputs.pop(key).min()) < width  # the row is not left
                    del wanted.outputs[key]
            assert got.gradient.isfinite().all() == wanted.gradient.isfinite().all()
            assert_same(got, wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pseudo", ["weak", "strong"])
def test_the_label_of_a_row_of_nan_is_a_class(
    width: int, pseudo: Literal["weak", "strong"], fused: str
) -> None:
    """An index past the row would be a stray read on a GPU."""
    x, a = problem(fused, 3, width)
    x[1:] = math.nan
    x[1:, 1::2] = -math.inf
    outputs, _ = LOSSES["teacher"](x, a._replace(pseudo=pseudo))
    assert 0 <= int(outputs["label"].item()) < width
    assert outputs["loss"].isnan()


@pytest.mark.parametrize("name", ["smoothed_ce", "student hard", "student hard, one pass"])
@pytest.mark.parametrize("bad", [-1, 10, 1 << 40, -(1 << 40), -100])
def test_labels_out_of_range_are_nan(name: str, bad: int, device: str) -> None:
    x, a = problem(device, 3, 10)
    a.label[1] = bad
    outputs, gradient = check(name, x, a)
    assert outputs["loss"].isnan()
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [-1, 10, 1 << 40, -(1 << 40), -100])
@pytest.mark.parametrize("whose", ["target", "pseudo", "truth"])
def test_the_teachers_labels_out_of_range(whose: str, bad: int, device: str) -> None:
    x, a = problem(device, 3, 10)
    row = ("target", "pseudo", "truth").index(whose)
    a.label[row] = bad
    outputs, gradient = check("teacher", x, a)
    assert outputs["sup"].isnan() == (whose == "target")
    assert outputs["mpl"].isnan() == (whose == "pseudo")
    assert outputs["loss"].isnan() == (whose != "truth")
    wrong = {"target": 0, "pseudo": 2}.get(whose)
    assert gradient.isnan().any(1).tolist() == [i == wrong for i in range(3)]
    assert outputs["pseudo_accuracy"].item() == 0.0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("row", ["weak", "strong"])
def test_a_threshold_does_not_hide_nan(width: int, row: str, device: str) -> None:
    """A step on broken logits must be skipped, which the NaN causes."""
    x, a = problem(device, 3, width)
    x[("labeled", "weak", "strong").index(row), 3] = math.nan
    outputs, gradient = LOSSES["teacher"](x, a._replace(threshold=2.0, feedback=0.0))
    assert outputs["uda"].isnan() and outputs["loss"].isnan()
    assert gradient[2].isnan().any()
    assert outputs["mask_rate"].item() == 0.0


@pytest.mark.parametrize("width", WIDTHS)
def test_ties_go_to_the_first_class(width: int, device: str) -> None:
    x = torch.zeros(3, width, device=device)
    x[:, [3, 4, width - 1]] = 2.0
    a = Arguments(torch.tensor([3, 4, width - 1], device=x.device), x)
    assert losses.pseudo_labels(x).label.tolist() == [3, 3, 3]
    assert losses.smoothed_ce(x, a.label).accuracy.item() == pytest.approx(1 / 3)
    for view in ("weak", "strong"):
        outputs, _ = check("teacher", x, a._replace(pseudo=view))
        assert outputs["label"].tolist() == [3]


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 10])
def test_thresholds_are_met_by_equality(classes: int, device: str) -> None:
    x = torch.zeros(3, classes, device=device)
    a = Arguments(labels(3, classes).to(device), x)
    for threshold, rate in ((1 / classes, 1.0), (1 / classes + 1e-6, 0.0)):
        for name in ("teacher", "cosine"):
            outputs, _ = LOSSES[name](x, a._replace(threshold=threshold))
            assert outputs["mask_rate"].item() == rate


def test_nothing_passes_a_threshold_above_one(device: str) -> None:
    x, a = problem(device, 3, 10)
    masked, gradient = check("cosine", x, a._replace(threshold=1.5))
    assert not gradient.any() and masked["mask_rate"].item() == masked["loss"].item() == 0.0
    assert check("cosine", x, a).gradient.any()
    outputs, alone = check("teacher", x, a._replace(threshold=1.5, feedback=0.0))
    assert outputs["uda"].item() == outputs["mask_rate"].item() == 0.0
    assert outputs["confidence"].item() > 0
    _, none = check("teacher", x, a._replace(uda_weight=0.0, feedback=0.0))
    for gradient in (alone, none):
        assert gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("temperature", [1e-8, 1e-38])
def test_a_tiny_temperature_is_the_arg_max(width: int, temperature: float, device: str) -> None:
    x, a = problem(device, 3, width)
    cold = a._replace(temperature=temperature, threshold=1.0, pseudo="weak")
    outputs, _ = check("teacher", x, cold)
    assert outputs["label"].item() == x[1].argmax().item()
    assert outputs["mask_rate"].item() == 1.0
    assert outputs["uda"].item() == pytest.approx(outputs["mpl"].item(), rel=1e-6)
    sharp = torch.where(a.other == a.other.amax(-1, keepdim=True), 1e3, -1e3)
    soft, hard = (check("cosine", x, b).outputs for b in (cold, a._replace(other=sharp)))
    assert soft["loss"].item() == pytest.approx(hard["loss"].item(), rel=1e-6)
    assert soft["mask_rate"].item() == 1.0


@EVERY_LOSS
@pytest.mark.parametrize("width", WIDTHS)
def test_huge_logits_do_not_overflow(name: str, width: int, fused: str) -> None:
    """No further than in PyTorch: a class that is 6e38 below another one has log p = -inf."""
    x, a = problem(fused, 3, width)
    for row, column in itertools.product(range(3), (0, 2, 4)):
        x[row, column] = 3e38 if (row + column) % 3 else -3e38
    x[1, 1] = -2e38
    for other in (a.other,) if name == "exact" else (x, x.roll(1, 0), a.other):
        given = a._replace(label=x.argmax(-1), other=other, pseudo="weak")
        answer = LOSSES[name](x, given)
        with losses.use("reference"):
            wanted = LOSSES[name](x, given)
        assert answer.gradient.isfinite().all()
        assert_same(answer._replace(gradient=x[:0]), wanted._replace(gradient=x[:0]))


# What carries a gradient, and where it comes from.


@EVERY_TERMS
def test_only_the_loss_carries_a_gradient(name: str, device: str) -> None:
    x, a = problem(device, 3, 10)
    leaf, other = x.requires_grad_(), a.other.requires_grad_()
    weight, feedback = torch.ones(3, device=x.device), torch.tensor(0.5, device=x.device)
    a = a._replace(weight=weight.requires_grad_(), feedback=feedback.requires_grad_())
    outputs = named(TERMS[name](leaf, a))
    assert [key for key, value in outputs.items() if value.requires_grad] == ["loss"]
    outputs["loss"].backward()
    assert leaf.grad is not None
    assert other.grad is weight.grad is feedback.grad is None
    with torch.no_grad():
        quiet = named(TERMS[name](leaf, a))
    assert not named(TERMS[name](leaf.detach(), a))["loss"].requires_grad
    for key, value in outputs.items():
        assert torch.equal(value, quiet[key])


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_carries_no_gradient(name: str, device: str) -> None:
    x, a = problem(device, 3, 10)
    plain = LOSSES[name](x, a)
    number = torch.tensor(0.5, device=x.device, requires_grad=True)
    taped = a._replace(other=a.other.requires_grad_(), feedback=number)
    found = LOSSES[name](x.requires_grad_(), taped)
    with torch.no_grad():
        quiet = LOSSES[name](x, taped)
    for one, two, three in zip(*map(flat, (plain, found, quiet)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert not two.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("width", [10, 1025, 9000])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_pass_equals_two(kind: str, dtype: torch.dtype, width: int, fused: str) -> None:
    x, a = problem(fused, 3, width, dtype)
    a = a._replace(smoothing=0.1, weight=torch.tensor([0.5, 1.0, 2.0], device=x.device))
    leaf = x.clone().requires_grad_()
    loss = named(TERMS[f"student {kind}"](leaf, a))["loss"]
    once = LOSSES[f"student {kind}, one pass"](x, a)
    assert torch.equal(loss, once.outputs["loss"])
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], once.gradient)


@EVERY_TERMS
def test_backward_passes(name: str, fused: str) -> None:
    """Twice, of logits that have changed since, of a loss that is changed itself, and taped."""
    x, a = problem(fused, 3, 10)
    leaf = x.clone().requires_grad_()
    loss = named(TERMS[name](leaf, a))["loss"]
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2.0 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    logits = leaf * 1.0
    loss = named(TERMS[name](logits, a))["loss"]
    logits += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = named(TERMS[name](leaf, a))["loss"]
    if loss._is_view():  # of a tensor with statistics
        with pytest.raises(RuntimeError, match="modified inplace"):
            loss.div_(2.0)
    loss = named(TERMS[name](leaf, a))["loss"]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


class Blocked(torch.autograd.Function):
    """Returns its input, and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


@EVERY_TERMS
def test_a_loss_may_receive_no_gradient(name: str, device: str) -> None:
    x, a = problem(device, 3, 10)
    leaf = x.requires_grad_()
    loss = named(TERMS[name](leaf, a))["loss"]
    blocked = Blocked.apply(loss)
    (gradient,) = torch.autograd.grad(blocked, leaf, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any()
    (total,) = torch.autograd.grad(blocked + loss, leaf, retain_graph=True)
    assert torch.equal(total, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("name", ["teacher", "exact"])
def test_a_weight_may_be_a_number_or_a_tensor_of_any_type(name: str, device: str) -> None:
    """Inductor keeps a number of Python as a 0-dim float64."""
    x, a = problem(device, 3, 10)
    single, double = (
        torch.tensor([0.7, -0.3], dtype=dtype, device=device).unbind()
        for dtype in (FLOAT, torch.float64)
    )
    weights: list[tuple[Scalar, ...]] = [(0.7, -0.3), single, double]
    found = [flat(LOSSES[name](x, a._replace(uda_weight=u, feedback=h))) for u, h in weights]
    for one, two, three in zip(*found, strict=True):
        assert one.dtype == two.dtype == three.dtype
        assert torch.equal(one, two) and torch.equal(one, three)


# 16-bit gradients.


@EVERY_TERMS
def test_float16_gradients_survive_under_a_loss_scale(name: str, device: str) -> None:
    """The scale is multiplied in before the gradient is rounded."""
    x, a = problem(device, 3, 1000, torch.float16)
    small, scale = 1e-4, torch.tensor(2.0**16, device=x.device)

    def scaled(leaf: Tensor, b: Arguments) -> Tensor:
        return small * scale / UPSTREAM * named(TERMS[name](leaf, b))["loss"]

    with losses.use("reference"):
        wanted = differentiated(scaled)(x.double(), a.double()).gradient
    kept = differentiated(scaled)(x, a).gradient
    assert_gradient(kept, wanted)
    leaf = x.clone().requires_grad_()
    (lost,) = torch.autograd.grad(small * named(TERMS[name](leaf, a))["loss"], leaf)
    assert (lost == 0).sum() > (kept == 0).sum()


def test_p_minus_one_survives_rounding(device: str) -> None:
    """p rounds to 1 in float16, and p - 1 does not to 0."""
    logits = torch.zeros(1, 10, dtype=torch.float16, device=device)
    logits[0, 3] = 11.0
    logits.requires_grad_()
    loss = losses.smoothed_ce(logits, torch.tensor([3], device=logits.device)).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 3].item() == pytest.approx(-9.0 / (9.0 + math.exp(11.0)), rel=2e-3)


# Sampled pseudo labels.


@pytest.mark.parametrize("classes", CLASSES)
def test_labels_are_sampled_as_in_float64(classes: int, device: str) -> None:
    weak = rows(12, classes).to(device)
    generator = torch.Generator().manual_seed(classes)
    uniforms = torch.rand(12, 2, generator=generator).to(weak.device)[:, 0]  # strided
    got = losses.pseudo_labels(weak, uniforms=uniforms)
    with losses.use("reference"):
        wanted = losses.pseudo_labels(weak.double(), uniforms=uniforms.double())
    torch.testing.assert_close(got.confidence, wanted.confidence, rtol=2e-6, atol=2e-6)
    # log p is a logit minus the logarithm of a sum, both rounded to float32, on any processor.
    rounding = 2.0**-23 * weak.abs().max().item()
    torch.testing.assert_close(got.entropy, wanted.entropy, rtol=2e-6, atol=2e-6 + rounding)
    steps = weak.double().softmax(-1).cumsum(-1)
    border = (steps - uniforms[:, None].double()).abs().amin(-1)
    clear = border > 1e-6  # rounding decides the others
    assert clear.sum() >= 6
    assert got.label[clear].tolist() == wanted.label[clear].tolist()
    for row in range(12):  # and no further than to a neighbor
        above = steps[row, got.label[row]].item()
        below = 0.0 if got.label[row] == 0 else steps[row, got.label[row] - 1].item()
        assert below - 1e-6 <= uniforms[row].item() <= above + 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_samples_at_both_ends_are_possible_classes(width: int, device: str) -> None:
    weak = torch.full((5, width), -math.inf, device=device)
    weak[:, [2, width - 3]] = 1.0
    uniforms = torch.tensor([0.0, 0.4999999, 0.5, 1.0 - 2.0**-24, 1.0], device=weak.device)
    got = losses.pseudo_labels(weak, uniforms=uniforms)
    assert got.label.tolist() == [2, 2, width - 3, width - 3, width - 3]
    assert got.confidence.tolist() == [0.5] * 5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_samples_of_infinities_and_nan(
    width: int, poison: str, everywhere: bool, device: str
) -> None:
    weak = rows(1, width).to(device)
    columns = slice(None, None, 2 if poison == "nan" else None) if everywhere else slice(1, 2)
    weak[0, columns] = POISONS[poison]
    uniforms = torch.tensor([0.7], device=weak.device)
    got = losses.pseudo_labels(weak, uniforms=uniforms)
    with losses.use("reference"):
        wanted = losses.pseudo_labels(weak, uniforms=uniforms)
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert 0 <= int(got.label.item()) < width  # an index past the row would be a stray read
