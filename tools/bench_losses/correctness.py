"""Before anything is timed: does every contestant compute the loss, compared with float64?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpl_fast.kernels import reference
from tools.bench_losses import contestants
from tools.bench_losses.contestants import Done
from tools.bench_losses.problems import LOSSES, Inputs, Shape, draw

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


def check(
    shapes: Sequence[tuple[int, int, torch.dtype]], names: Sequence[str], device: str
) -> list[Json]:
    """A row for each contestant at each shape and loss; `wrong` is empty if all is well."""
    rows = []
    for classes, width, dtype in shapes:
        for loss in LOSSES:
            shape = Shape(loss, classes, width, BATCH, dtype)
            # A new draw each time: the seed is kept, so that a failure can be repeated.
            seed = torch.seed() % 2**31
            x = draw(shape, "cpu", torch.Generator().manual_seed(seed))
            wanted = _oracle(shape, x)
            for name in names:
                if name in contestants.names(shape) and name != contestants.LIGER:
                    row = {"shape": str(shape), "contestant": name, "seed": seed}
                    rows.append(row | _compare(shape, name, _to(x, device), wanted))
    return rows


def _oracle(shape: Shape, x: Inputs) -> Done:
    """Out and gradient of the definition in float64, on the CPU."""
    lifted = x._replace(logits=x.logits.detach().double().requires_grad_())
    return contestants.of_backend(reference, shape)(lifted)


def _to(x: Inputs, device: str) -> Inputs:
    moved = Inputs(*(tensor.detach().to(device) for tensor in x))
    moved.logits.requires_grad_()
    return moved


def _compare(shape: Shape, name: str, x: Inputs, wanted: Done) -> Json:
    """The largest errors, and in words what is too large."""
    if x.logits.is_cuda:
        _poison(shape)
    got = contestants.build(name, shape)(x)
    wrong, worst = [], 0.0
    for field, value in got.out._asdict().items():
        value, truth = value.detach().cpu(), getattr(wanted.out, field).detach()
        if value.dtype == torch.int64:
            if not torch.equal(value, truth):
                wrong.append(f"{field} differs")
        else:
            error = float(((value.double() - truth).abs() / truth.abs().clamp_min(1.0)).max())
            worst = max(worst, error)
            if not error <= STATISTIC:
                wrong.append(f"{field} is off by {error:.1e}")
    row: Json = {"statistics": worst}
    if got.gradient is not None and wanted.gradient is not None:
        error = _distance(got.gradient.detach().cpu().double(), wanted.gradient)
        rounding = _distance(wanted.gradient.to(shape.dtype).double(), wanted.gradient)
        row |= {"gradient": error, "rounding": rounding}
        if not error <= ROUNDING * rounding + FLOAT32:  # also true of NaN
            wrong.append(f"the gradient is off by {error:.1e}, rounding alone by {rounding:.1e}")
    return {**row, "wrong": "; ".join(wrong)}


def _distance(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _poison(shape: Shape) -> None:
    """Leaves NaN in the memory that the allocator hands out next: what is unwritten shows."""
    blocks = [torch.full((shape.rows, shape.width), torch.nan, device="cuda", dtype=shape.dtype)]
    blocks += [torch.full((2**n,), torch.nan, device="cuda") for n in range(4, 16)]
    del blocks
