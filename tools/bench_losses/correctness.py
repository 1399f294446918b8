"""Before anything is timed: does every contestant compute the loss, compared with float64?"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.bench_losses import contestants
from tools.bench_losses.contestants import Call, Done
from tools.bench_losses.problems import LOSSES, TEMPERATURE, THRESHOLD, Inputs, Shape, draw

Json = dict[str, Any]
BATCH = 40
SHAPES = [
    (10, 10, torch.float32),
    (1000, 1000, torch.bfloat16),
    (1000, 1000, torch.float16),
    (8192, 8192, torch.float32),
    (21841, 21888, torch.bfloat16),
    (21841, 21841, torch.bfloat16),
]
STATISTIC = 2e-6  # relative, or absolute below 1; float32 sums
ROUNDING = 1.05  # times the error of rounding the float64 gradient to the logits' type
FLOAT32 = 1e-6  # relative to the gradient's norm
BORDER = 1e-5  # a confidence so close to the threshold may fall to either side


class Case(NamedTuple):
    """Inputs, and what the definition makes of them in float64."""

    shape: Shape
    seed: int
    inputs: Inputs
    wanted: Done


def case(shape: Shape, device: str) -> Case:
    """A new draw each time, computed on `device`: its seed is kept, so that it can be repeated."""
    for _ in range(10):
        seed = torch.seed() % 2**31
        x = draw(shape, device, torch.Generator(device).manual_seed(seed))
        if not _at_the_border(shape, x):
            break
    lifted = x._replace(logits=x.logits.detach().double().requires_grad_())
    return Case(shape, seed, x, contestants.definition(shape)(lifted))


def check(
    shapes: Sequence[tuple[int, int, torch.dtype]],
    names: Sequence[str],
    device: str,
    save: Callable[[Json], None] = lambda row: None,
) -> list[Json]:
    """A row for each contestant at each shape and loss; `wrong` is empty if all is well.

    float64 is the CPU's, so that a fault of the device cannot hide.
    """
    rows = []
    for classes, width, dtype in shapes:
        for loss in LOSSES:
            one = case(Shape(loss, classes, width, BATCH, dtype), "cpu")
            for name in names:
                if name in contestants.names(one.shape):
                    row = {"shape": str(one.shape), "loss": loss, "contestant": name}
                    rows.append(row | attempt(one, name, device))
                    save(rows[-1])
    return rows


def attempt(one: Case, name: str, device: str) -> Json:
    """`compare`, where a contestant that raises is wrong as well."""
    try:
        return compare(one, contestants.build(name, one.shape), name, device)
    except Exception as error:
        return {"seed": one.seed, "wrong": line(error)}


def compare(one: Case, call: Call, name: str, device: str) -> Json:
    """The largest errors of a contestant, and in words what is too large."""
    moved = Inputs(*(tensor.detach().to(device, copy=True) for tensor in one.inputs))
    moved.logits.requires_grad_()
    if moved.logits.is_cuda:
        _poison(one.shape)
    got, wanted = call(moved), one.wanted
    rough = _unit(one.shape.dtype) if name in contestants.ROUGH else 0.0
    wrong, worst = [], 0.0
    for field, value in got.out._asdict().items():
        truth = getattr(wanted.out, field).detach()
        value = value.detach().to(truth.device)
        if value.dtype == torch.int64:
            if not torch.equal(value, truth):
                wrong.append(f"{field} differs")
        else:
            error = float(((value.double() - truth).abs() / truth.abs().clamp_min(1.0)).max())
            worst = max(worst, error)
            if not error <= STATISTIC + 4 * rough:
                wrong.append(f"{field} is off by {error:.1e}")
    row: Json = {"seed": one.seed, "statistics": worst}
    if got.gradient is not None and wanted.gradient is not None:
        # Who differentiates the last rows alone leaves out the ones whose gradient is 0.
        truth = wanted.gradient[len(wanted.gradient) - len(got.gradient) :]
        error = _distance(got.gradient.detach().to(truth.device).double(), truth)
        rounding = _distance(truth.to(one.shape.dtype).double(), truth)
        row |= {"gradient": error, "rounding": rounding}
        if not error <= (2.0 if rough else ROUNDING) * rounding + FLOAT32:  # also true of NaN
            wrong.append(f"the gradient is off by {error:.1e}, rounding alone by {rounding:.1e}")
    return {**row, "wrong": "; ".join(wrong)}


def line(error: Exception) -> str:
    """An error in one line that is not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _at_the_border(shape: Shape, x: Inputs) -> bool:
    if shape.loss != "teacher":
        return False
    weak = x.logits.detach()[shape.labeled : shape.labeled + shape.batch, : shape.classes]
    confidence = (weak.double() / TEMPERATURE).softmax(-1).amax(-1)
    return bool(((confidence - THRESHOLD).abs() < BORDER).any())


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _distance(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _poison(shape: Shape) -> None:
    """Leaves NaN in the memory that the allocator hands out next: what is unwritten shows."""
    blocks = [torch.full((shape.rows, shape.width), torch.nan, device="cuda", dtype=shape.dtype)]
    blocks += [torch.full((2**n,), torch.nan, device="cuda") for n in range(4, 16)]
    del blocks
