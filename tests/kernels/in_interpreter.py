"""The Triton kernel against the float64 reference, on Triton's interpreter (TRITON_INTERPRET=1).

Not collected by itself: Triton reads that variable when a kernel is decorated, so this needs a
process of its own. `test_triton.py` starts it.
"""

import itertools
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.kernels.by_hand import NONE
from tests.kernels.interpreted_rows import assert_gradient, assert_value, labels, rows

pytestmark = [
    # inf * 0 and the like are meant; the interpreter runs on numpy, which remarks on them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Two classes; fewer than a warp; a plain middle; ImageNet; one past a power of two; one past the
# widest row in registers: four blocks and a bit, read in a loop.
CLASSES = [2, 10, 100, 1000, 1025, 8193]


def compare(logits: Tensor, target: Tensor, unlabeled: int, **options: object) -> losses.TeacherOut:
    """Checks value, statistics, labels and gradient against float64; returns the kernel's."""
    x = logits.detach().requires_grad_()
    oracle = logits.detach().double().requires_grad_()
    with losses.use("triton"):
        out = losses.teacher_loss(x, target, unlabeled, **options)  # type: ignore[arg-type]
    with losses.use("reference"):
        expected = losses.teacher_loss(oracle, target, unlabeled, **options)  # type: ignore[arg-type]
    assert out.label.tolist() == expected.label.tolist()
    for name, got in out._asdict().items():
        if name != "label":
            assert_value(got, getattr(expected, name), name)
    (gradient,) = torch.autograd.grad(out.loss, x)
    (wanted,) = torch.autograd.grad(expected.loss, oracle)
    assert_gradient(gradient, wanted)
    return out


# Each setting differs from the next in every option: temperature, threshold, smoothing, feedback,
# weight, whose label, and how much wider than the classes a row is.
SETTINGS = [
    (1.0, 0.0, 0.0, 0.3, 1.0, "weak", 0),
    (0.7, 0.6, 0.1, -0.2, 8.0, "strong", 3),
    (0.05, 0.9, 0.15, 0.0, 0.5, "given", 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_agrees_with_float64(
    classes: int, dtype: torch.dtype, setting: tuple[float, float, float, float, float, str, int]
) -> None:
    temperature, threshold, smoothing, feedback, weight, pseudo, padding = setting
    target = labels(5, classes)
    target[3] = -100
    out = compare(
        rows(5 + 2 * 6, classes, dtype, padding),
        target,
        6,
        uda_weight=weight,
        feedback=torch.tensor(feedback),
        temperature=temperature,
        threshold=threshold,
        label_smoothing=smoothing,
        pseudo=labels(6, classes) if pseudo == "given" else pseudo,
        truth=labels(6, classes),
        num_classes=classes,
    )
    assert out.sup.item() > 0 < out.mpl.item()


def test_agrees_with_float64_on_imagenet_21k() -> None:
    """21841 classes, padded to a multiple of 8."""
    logits = rows(3 + 2 * 2, 21841, torch.bfloat16, 7)
    target = torch.tensor([21840, 0, 12345])
    options = {"temperature": 0.7, "label_smoothing": 0.1, "num_classes": 21841}
    compare(logits, target, 2, uda_weight=8.0, feedback=-0.3, **options)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(3, 0), (0, 5), (1, 1), (0, 0)])
def test_rows_of_a_kind_may_be_missing(labeled: int, unlabeled: int) -> None:
    x = rows(labeled + 2 * unlabeled, 10, torch.float32)
    compare(x, labels(labeled, 10), unlabeled, uda_weight=2.0, feedback=0.5)


@pytest.mark.parametrize("classes", [10, 9001])
def test_smoothed_ce_and_its_accuracy(classes: int) -> None:
    logits = rows(6, classes, torch.float32).requires_grad_()
    target = torch.cat((logits[:2].argmax(-1), labels(3, classes), torch.tensor([-100])))
    with losses.use("triton"):
        out = losses.smoothed_ce(logits, target, label_smoothing=0.1)
    expected = losses.smoothed_ce(logits, target, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert out.accuracy.item() == pytest.approx(expected.accuracy.item())
    assert out.accuracy.item() >= 2 / 6 - 1e-6
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, logits), torch.autograd.grad(expected.loss, logits)
    )


def test_strided_rows_are_read_where_they_lie() -> None:
    for pitch in (40, 41):
        wide = rows(7, pitch, torch.float32)
        for logits in (wide[:, 3:13], wide[:, ::4], wide[:, :7].T[:7]):
            assert not logits.is_contiguous()
            compare(logits, labels(1, 7), 3, uda_weight=1.0, feedback=1.0)


def test_the_gradient_follows_what_comes_from_above() -> None:
    logits = rows(5, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        loss = losses.teacher_loss(logits, labels(1, 10), 2, uda_weight=1.0, feedback=0.5).loss
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (thrice,) = torch.autograd.grad(3.0 * loss, logits)
    torch.testing.assert_close(thrice, 3.0 * once)
    with torch.no_grad(), losses.use("triton"):
        silent = losses.teacher_loss(logits, labels(1, 10), 2, uda_weight=1.0, feedback=0.5).loss
    assert silent.item() == loss.item()
    assert not silent.requires_grad


def test_two_derivatives_are_refused() -> None:
    logits = rows(5, 10, torch.float32).requires_grad_()
    with losses.use("triton"):
        loss = losses.teacher_loss(logits, labels(1, 10), 2, uda_weight=1.0, feedback=0.5).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 10])
def test_threshold_is_met_by_equality(classes: int) -> None:
    logits = torch.zeros(2, classes)
    with losses.use("triton"):
        out = losses.teacher_loss(
            logits, NONE, 1, uda_weight=1.0, feedback=0.0, threshold=1 / classes
        )
    assert out.mask_rate.item() == 1.0


@pytest.mark.parametrize("width", [6, 9000])  # in one block, and in a loop
@pytest.mark.parametrize(
    "poison", [math.nan, -math.inf, math.inf], ids=["nan", "minus_inf", "plus_inf"]
)
@pytest.mark.parametrize("row", [0, 1, 2], ids=["labeled", "weak", "strong"])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_as_pytorch(
    width: int, poison: float, row: int, everywhere: bool, smoothing: float
) -> None:
    logits = rows(3, width, torch.float32)
    columns = slice(1, 2)
    if everywhere:  # of NaN every other one: the interpreter finds no maximum among NaN alone
        columns = slice(None, None, 2 if math.isnan(poison) else None)
    logits[row, columns] = poison
    options = {
        "uda_weight": 1.0,
        "feedback": 0.5,
        "pseudo": torch.tensor([2]),
        "label_smoothing": smoothing,
    }
    with losses.use("triton"):
        out = losses.teacher_loss(logits, torch.tensor([3]), 1, **options)  # type: ignore[arg-type]
    expected = losses.teacher_loss(logits, torch.tensor([3]), 1, **options)  # type: ignore[arg-type]
    for name in ("loss", "sup", "uda", "mpl"):
        assert getattr(out, name).item() == pytest.approx(
            getattr(expected, name).item(), rel=1e-5, nan_ok=True
        ), name


@pytest.mark.parametrize("width", [10, 9000])
@pytest.mark.parametrize("pseudo", ["weak", "strong"])
def test_the_label_of_a_row_of_nan_is_a_class(
    width: int, pseudo: Literal["weak", "strong"]
) -> None:
    """An index past the row would be a stray read on a GPU."""
    logits = torch.full((2, width), math.nan)
    logits[:, 1::2] = -math.inf
    with losses.use("triton"):
        out = losses.teacher_loss(
            logits, NONE, 1, uda_weight=1.0, feedback=1.0, pseudo=pseudo, num_classes=width - 1
        )
    assert 0 <= out.label.item() < width - 1
    assert out.loss.isnan()


@pytest.mark.parametrize("bad", [-1, 10, 1 << 40])
def test_labels_out_of_range_are_nan(bad: int) -> None:
    logits = rows(3, 10, torch.float32).requires_grad_()
    wrong, right = torch.tensor([bad]), torch.tensor([1])
    for target, pseudo in itertools.permutations((wrong, right)):
        with losses.use("triton"):
            out = losses.teacher_loss(
                logits, target, 1, uda_weight=1.0, feedback=1.0, pseudo=pseudo
            )
        (gradient,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.isnan()
        assert gradient[0].isnan().any() == (target is wrong)
        assert gradient[2].isnan().any() == (pseudo is wrong)


def test_ties_go_to_the_first_class() -> None:
    for width in (10, 9000):
        logits = torch.zeros(2, width)
        logits[:, [4, 7, width - 1]] = 2.0
        compare(logits, NONE, 1, uda_weight=1.0, feedback=1.0)
        with losses.use("triton"):
            assert losses.smoothed_ce(logits, torch.tensor([4, 7])).accuracy.item() == 0.5


@pytest.mark.parametrize("width", [4, 9000])
@pytest.mark.parametrize("temperature", [1e-8, 1e-38])
def test_a_tiny_temperature_is_the_arg_max(width: int, temperature: float) -> None:
    logits = torch.zeros(2, width)
    logits[0, width - 2] = 50.0
    logits[1, 1] = 3.0
    out = compare(
        logits, NONE, 1, uda_weight=1.0, feedback=1.0, temperature=temperature, threshold=1.0
    )
    assert out.label.tolist() == [width - 2]
    assert out.mask_rate.item() == 1.0


@pytest.mark.parametrize("labeled", [1, 3])
def test_row_offsets_do_not_overflow(labeled: int) -> None:
    """Rows 2**30 elements apart: the third starts past 2**31, a labeled one or a strong one."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16)  # only touched pages are real
    logits = memory.as_strided((3, 16), (pitch, 1))
    logits.copy_(rows(3, 16, torch.bfloat16))
    compare(logits, labels(labeled, 16), (3 - labeled) // 2, uda_weight=1.0, feedback=1.0)
