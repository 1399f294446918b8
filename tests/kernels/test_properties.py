"""What holds for all logits, tested on ones that hypothesis generates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpl_fast import losses
from tests.kernels.cases import (
    DOUBLE,
    EVERY_LOSS,
    FLOAT,
    INTERPRETED,
    LOSSES,
    Answer,
    Arguments,
    flat,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Differences of multiples of this lose no bits, even in float32.
STEP = 2**-8
multiples = st.integers(-20 * 2**8, 20 * 2**8).map(lambda i: i * STEP)
three_rows_of_four = st.lists(st.lists(multiples, min_size=4, max_size=4), min_size=3, max_size=3)
ORDER = [2, 0, 3, 1]
examples = settings(max_examples=8 if INTERPRETED else 30)  # the interpreter is slow


def answer(name: str, x: Tensor, a: Arguments) -> Answer:
    """By plain PyTorch in float64, or by the kernels in float32."""
    options = a._replace(smoothing=0.1, temperature=0.5, uda_weight=2.0, feedback=0.3)
    with losses.use("triton" if INTERPRETED else "reference"):
        return LOSSES[name](x, options)


def problem(rows: list[list[float]]) -> tuple[Tensor, Arguments]:
    x = torch.tensor(rows, dtype=FLOAT if INTERPRETED else DOUBLE)
    other = x.flip(0).roll(1, -1)
    return x, Arguments(other.argmax(-1), other)


def same(one: Answer, other: Answer) -> None:
    close = 1e-5 if INTERPRETED else 1e-10
    for key, a, b in zip([*one.outputs, "gradient"], flat(one), flat(other), strict=True):
        torch.testing.assert_close(
            a, b, rtol=close if a.dtype == DOUBLE else 1e-5, atol=max(close, 1e-10), msg=key
        )


@EVERY_LOSS
@examples
@given(rows=three_rows_of_four, shift=st.sampled_from([0.5, -1.0, 1024.0]))
def test_gradients_add_up_to_zero_and_shifts_change_nothing(
    name: str, rows: list[list[float]], shift: float
) -> None:
    x, a = problem(rows)
    found, shifted = answer(name, x, a), answer(name, x + shift, a)
    if name != "pseudo":
        assert found.gradient.sum(-1).abs().max().item() < (2e-6 if INTERPRETED else 1e-12)
    if INTERPRETED:  # the first thing that a kernel computes is x - max(x)
        assert all(map(torch.equal, flat(found), flat(shifted)))
    same(found, shifted)


@EVERY_LOSS
@examples
@given(rows=three_rows_of_four)
def test_the_order_of_classes_does_not_matter(name: str, rows: list[list[float]]) -> None:
    x, a = problem(rows)
    where = torch.tensor([ORDER.index(i) for i in range(4)])
    found = answer(name, x, a)
    moved = answer(name, x[:, ORDER], Arguments(where[a.label], a.other[:, ORDER]))
    for outputs in (found.outputs, moved.outputs):  # which of equals is first depends on order
        for key in {"label", "accuracy"} & {*outputs}:
            del outputs[key]
    wanted = found.gradient[:, ORDER]
    same(found._replace(gradient=wanted), moved)


@examples
@given(rows=three_rows_of_four, threshold=st.floats(1.001, 1e6))
def test_above_one_nothing_passes_the_threshold(rows: list[list[float]], threshold: float) -> None:
    x, a = problem(rows)
    with losses.use("triton" if INTERPRETED else "reference"):
        outputs, gradient = LOSSES["teacher"](x, a._replace(threshold=threshold, feedback=0.0))
        cosine = LOSSES["cosine"](x, a._replace(threshold=threshold))
    assert outputs["uda"].item() == outputs["mask_rate"].item() == 0.0
    assert not gradient[1:].any()
    assert cosine.outputs["loss"].item() == 0.0 and not cosine.gradient.any()


@examples
@given(
    rows=three_rows_of_four,
    weight=st.floats(-8, 8, width=32),
    h=st.floats(-2, 2, width=32),
)
def test_a_number_and_a_tensor_of_it_are_equal(
    rows: list[list[float]], weight: float, h: float
) -> None:
    x, a = problem(rows)
    with losses.use("triton" if INTERPRETED else "reference"):
        for name in ("teacher", "exact"):
            number = LOSSES[name](x, a._replace(uda_weight=weight, feedback=h))
            uda, feedback = torch.tensor(weight), torch.tensor(h)
            tensor = LOSSES[name](x, a._replace(uda_weight=uda, feedback=feedback))
            assert all(map(torch.equal, flat(number), flat(tensor)))


@examples
@given(rows=three_rows_of_four)
def test_the_cosine_loss_is_in_zero_to_one(rows: list[list[float]]) -> None:
    x, a = problem(rows)
    loss = answer("cosine", x, a).outputs["loss"].item()
    rounding = 1e-6 if INTERPRETED else 1e-12
    assert -rounding <= loss <= 1.0 + rounding
