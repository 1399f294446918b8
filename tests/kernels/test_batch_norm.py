"""Batch norm with its forward-mode derivative, compared with PyTorch's own in float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mpl_fast import losses
from mpl_fast.kernels.outputs import Dual
from mpl_fast.learner.jvp import _load_forward_rules
from tests.kernels.cases import INTERPRETED

FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
EPS = 1e-5
Given = tuple[Tensor, Tensor] | None
# Blocks that are full; odd channels and a last block of few rows; more channels than a block; a
# vector for each image; two rows; more than one step of a program.
SHAPES = [(4, 8, 4, 4), (3, 5, 7, 3), (3, 130, 3), (9, 3), (2, 1, 1, 1), (5, 16, 9, 8)]


class Problem(tuple[Dual, Dual, Dual, Given]):
    """Activation, weight, bias and given statistics."""

    def double(self) -> "Problem":
        x, w, b = (Dual(*(t.double() for t in dual)) for dual in self[:3])
        given = self[3] and (self[3][0].double(), self[3][1].double())
        return Problem((x, w, b, given))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the interpreter, whose time goes by the block: several of them for few numbers."""
    if INTERPRETED:
        from mpl_fast.kernels import batch_norm

        monkeypatch.setattr(batch_norm, "TILE", 128)
        monkeypatch.setattr(batch_norm, "PROGRAMS", 6)
    yield


def draw(shape: tuple[int, ...], seed: int = 0, mean: float = 0.0) -> Tensor:
    """Normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(shape, generator=generator, dtype=DOUBLE)


def problem(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, given: bool, mean: float = 0.0
) -> Problem:
    """Of which the activation, channels_last, is of `dtype` and all else float32."""
    drawn = (draw(shape, 0, mean), draw(shape, 1, -mean))
    x = Dual(*(t.to(device, dtype).movedim(1, -1).contiguous().movedim(-1, 1) for t in drawn))
    channels = [draw(shape[1:2], seed).to(device, FLOAT) for seed in range(2, 8)]
    statistics = channels[4] + mean, channels[5].abs() + 0.1
    weight, bias = Dual(*channels[:2]), Dual(*channels[2:4])
    return Problem((x, weight, bias, statistics if given else None))


def ours(p: Problem, slope: float = 1.0) -> Dual:
    return losses.backend(p[0].primal).batch_norm_jvp(*p, EPS, slope)


def of_pytorch(p: Problem, slope: float = 1.0) -> Dual:
    """By PyTorch's rule."""
    _load_forward_rules()
    x, w, b, given = p
    with torch.no_grad(), forward_ad.dual_level():
        image, weight, bias = (forward_ad.make_dual(*dual) for dual in (x, w, b))
        mean, var = given or (None, None)
        y = F.batch_norm(image, mean, var, weight, bias, training=given is None, eps=EPS)
        return Dual(*forward_ad.unpack_dual(F.leaky_relu(y, slope)))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, of all numbers together."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-9))


@pytest.mark.parametrize("slope", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_pytorchs_rule(shape: tuple[int, ...], given: bool, slope: float) -> None:
    p = problem("cpu", shape, DOUBLE, given).double()
    for found, expected in zip(ours(p, slope), of_pytorch(p, slope), strict=True):
        assert found.dtype == DOUBLE
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slope", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_derivative(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, given: bool, slope: float
) -> None:
    p = problem(device, shape, dtype, given)
    expected = of_pytorch(p.double(), slope)
    # The interpreter truncates to bfloat16 where others round.
    allowed = 2e-6 if dtype == FLOAT else 2**-7 if INTERPRETED else 2**-8
    for found, wanted in zip(ours(p, slope), expected, strict=True):
        assert found.dtype == dtype and found.shape == shape
        assert found.stride() == p[0].primal.stride()
        assert error(found, wanted) < allowed


@pytest.mark.parametrize("mean", [300.0, -3000.0])
def test_of_a_large_mean_no_more_than_itself_is_rounded(
    fused: str, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32, by at most 2**-24 of it; neither sums nor the means of many lanes are."""
    from mpl_fast.kernels import batch_norm

    monkeypatch.setattr(batch_norm, "TILE", 1024)
    p = problem(fused, (4, 4, 64, 64), FLOAT, False, mean)
    for found, wanted in zip(ours(p), of_pytorch(p.double()), strict=True):
        assert error(found, wanted) < 0.8 * 2**-24 * abs(mean)


def test_an_outlier_in_the_first_row_changes_no_digit_of_the_variance(device: str) -> None:
    """All sums are of differences from it."""
    p = problem(device, (5, 16, 9, 8), FLOAT, False)
    p[0].primal[0, :, 0, 0] += 1e4
    for found, wanted in zip(ours(p), of_pytorch(p.double()), strict=True):
        assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_one_row(device: str, dtype: torch.dtype) -> None:
    """Which is its own mean: PyTorch refuses it."""
    p = problem(device, (1, 3, 1, 1), dtype, False)
    y, dy = ours(p)
    for found, expected in ((y, p[2].primal), (dy, p[2].tangent)):
        torch.testing.assert_close(found.flatten().float(), expected, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("slope", [0.1, 0.0])
def test_at_zero_the_slope_is_the_one_below(device: str, slope: float) -> None:
    x, w, b, _ = problem(device, (3, 5, 7, 3), FLOAT, False)
    zero = Problem((x, *(Dual(torch.zeros_like(t), change) for t, change in (w, b)), None))
    y, dy = ours(zero, slope)
    assert not y.any()
    assert error(dy, of_pytorch(zero.double(), slope).tangent) < 2e-6
    assert dy.any() == (slope > 0.0)


def test_any_layout(device: str) -> None:
    """Also where value and derivative differ in it; and nothing is written to the arguments."""
    p = problem(device, (4, 6, 5, 3), FLOAT, False)
    x, w, b, _ = p
    before = [part.clone() for part in (*x, *w, *b)]
    expected = of_pytorch(p.double())
    mixed = Dual(x.primal.contiguous(), x.tangent.mT.contiguous().mT)
    sliced = Dual(*(torch.stack([part, part], -1)[..., 0] for part in w))
    for found, wanted in zip(ours(Problem((mixed, sliced, b, None))), expected, strict=True):
        assert error(found, wanted) < 2e-6
    assert all(map(torch.equal, before, (*x, *w, *b)))


def test_a_nan_stays_in_its_channel(device: str) -> None:
    p = problem(device, (4, 6, 5, 3), FLOAT, False)
    expected = ours(p, 0.0)
    p[0].primal[1, 2, 3, 1] = torch.nan
    for found, wanted in zip(ours(p, 0.0), expected, strict=True):
        assert found[:, 2].isnan().all()
        assert torch.equal(found[:, :2], wanted[:, :2])
        assert torch.equal(found[:, 3:], wanted[:, 3:])
