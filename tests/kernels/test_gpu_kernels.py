"""What only a GPU can show of the values of fused losses: rounding, scaling, far rows."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import losses
from tests.kernels.gpu_problem import LABELED, Problem, everything, gradient

pytestmark = pytest.mark.gpu

# ImageNet; the widest row in registers; ImageNet-21k in a loop, padded and not.
ROWS = [(1000, 1000), (8192, 8192), (21841, 21848), (21841, 21841)]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of rounding


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """The kernels, whatever the environment says."""
    with losses.use("triton"):
        yield


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("classes", "width"), ROWS)
@pytest.mark.parametrize("mode", ["one pass", "recompute"])
def test_gradients_are_off_by_their_rounding_alone(
    classes: int, width: int, dtype: torch.dtype, mode: str
) -> None:
    p = Problem(classes, width, dtype)
    oracle = p.lifted()
    with losses.use("reference"):
        expected = oracle.teacher()
        wanted = gradient(expected.loss, oracle)
    out, got = p.teacher_and_grad() if mode == "one pass" else (p.teacher(), torch.empty(0))
    if mode == "recompute":
        got = gradient(out.loss, p)
    assert torch.equal(out.label, expected.label)
    for name in ("loss", "sup", "uda", "mpl", "mask_rate", "confidence", "entropy"):
        value, truth = getattr(out, name).item(), getattr(expected, name).item()
        assert value == pytest.approx(truth, rel=2e-6, abs=2e-6), name
    # Half a step of the type, and float32's own error where p - 1[y] cancels.
    torch.testing.assert_close(got.double(), wanted, rtol=1.02 * UNIT[dtype] + 1e-6, atol=3e-8)
    error = (got.double() - wanted).norm()
    rounding = (wanted.to(dtype).double() - wanted).norm()
    assert error <= 1.05 * rounding + 1e-6 * wanted.norm()
    assert got[:, classes:].count_nonzero() == 0


@pytest.mark.parametrize(("classes", "width"), ROWS)
def test_two_runs_are_equal(classes: int, width: int) -> None:
    p = Problem(classes, width, torch.bfloat16)
    first, second = everything(p), everything(p)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_autocast_changes_nothing_inside() -> None:
    p = Problem(1000, 1000, torch.bfloat16)
    wanted = everything(p)
    with torch.autocast("cuda", torch.bfloat16):
        got = everything(p)
        head = nn.Linear(32, 10, device="cuda")
        logits = head(torch.randn(8, 32, device="cuda"))
        loss = losses.smoothed_ce(logits, torch.arange(8, device="cuda")).loss
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max().item() > 0


def test_the_scale_of_a_grad_scaler_saves_small_gradients() -> None:
    p = Problem(1000, 1000, torch.float16)
    oracle = p.lifted()
    with losses.use("reference"):
        wanted = gradient(oracle.teacher().loss, oracle)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    scale = scaler.scale(torch.ones((), device="cuda"))
    _, plain = p.teacher_and_grad()
    _, scaled = p.teacher_and_grad(scale)
    unscaled = scaled.double() / 2.0**14
    lost, kept = ((g.double() - wanted).norm() / wanted.norm() for g in (plain, unscaled))
    torch.testing.assert_close(unscaled, wanted, rtol=1.02 * 2**-11, atol=2**-24 / 2**14 + 3e-8)
    assert kept <= lost
    assert (plain == 0).sum() > (scaled == 0).sum()


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_grad_scaler_steps_and_skips(poisoned: bool) -> None:
    head = nn.Linear(16, 10, device="cuda")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scale = scaler.scale(torch.ones((), device="cuda"))
    images = torch.randn(8, 16, device="cuda")
    if poisoned:
        images[-1, 0] = torch.inf
    before = head.weight.detach().clone()
    with torch.autocast("cuda", torch.float16):
        logits = head(images)
    _, grad = losses.student_loss_and_grad(
        logits, torch.arange(8, device="cuda"), label_smoothing=0.1, grad_scale=scale
    )
    logits.backward(grad)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before) == poisoned
    assert scaler.get_scale() == (2.0**9 if poisoned else 2.0**10)


def test_row_offsets_do_not_overflow() -> None:
    """Rows 2**30 elements apart: the third starts past 2**31."""
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 64, dtype=torch.bfloat16, device="cuda")
    logits = memory.as_strided((3, 16), (pitch, 1))
    logits.copy_(torch.randn(3, 16))
    target = torch.arange(3, device="cuda")
    got = losses.smoothed_ce(logits, target).loss
    assert got.item() == pytest.approx(losses.smoothed_ce(logits.clone(), target).loss.item())


def test_compiled_as_one_graph() -> None:
    p = Problem(1000, 1000, torch.bfloat16)

    def step(logits: Tensor) -> Tensor:
        return losses.smoothed_ce(logits[:LABELED], p.target, label_smoothing=0.1).loss

    compiled = torch.compile(step, fullgraph=True)
    # The sums of a few rows may be added up in another order.
    assert compiled(p.logits).item() == pytest.approx(step(p.logits).item(), rel=1e-6)
    assert torch.equal(gradient(compiled(p.logits), p), gradient(step(p.logits), p))
