"""The teacher's kernel as one op of PyTorch: it allocates outputs and launches, nothing else."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpl_fast.kernels.launch import align, launch_config, register, wrap_triton
from mpl_fast.kernels.teacher import STATISTICS, teacher_kernel


class Request(NamedTuple):
    """What the kernel needs besides logits; the same in the forward and the backward pass."""

    target: Tensor  # (L,) int64
    given: Tensor  # (U,) int64 if has_given, else any
    truth: Tensor  # (U,) int64 if has_truth, else any
    uda_weight: Tensor  # 0-dim float32
    feedback: Tensor  # 0-dim float32
    has_given: bool
    has_truth: bool
    from_strong: bool
    n_unlabeled: int
    ignore_index: int
    num_classes: int
    temperature: float
    threshold: float
    label_smoothing: float


def _outputs(
    x: Tensor, request: Request, stats: bool, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch` returns, of unwritten memory."""
    rows, width = x.shape
    n_u = request.n_unlabeled
    part = x.new_empty((len(STATISTICS), rows - n_u if stats else 0), dtype=torch.float32)
    label = x.new_empty(n_u if stats else 0, dtype=torch.int64)
    saved = x.new_empty((2, rows if stats and not grad else 0), dtype=torch.float32)
    return part, label, saved, x.new_empty((rows if grad else 0, width))


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, _, _, stats, grad = arguments
    return _outputs(x, Request(*fields), stats, grad)


def _launch(
    x: Tensor,
    target: Tensor,
    given: Tensor,
    truth: Tensor,
    uda_weight: Tensor,
    feedback: Tensor,
    has_given: bool,
    has_truth: bool,
    from_strong: bool,
    n_unlabeled: int,
    ignore_index: int,
    num_classes: int,
    temperature: float,
    threshold: float,
    label_smoothing: float,
    saved: Tensor,
    upstream: list[Tensor],
    stats: bool,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics (len(STATISTICS), L + U), labels (U,), saved (2, L + 2U), gradient (L + 2U, W).

    What is not asked for is empty. saved: the third of these, where only the gradient is asked for.
    upstream: gradients that arrive for loss, sup, uda and mpl, or for loss, or none, which is 1.
    """
    request = Request(
        target,
        given,
        truth,
        uda_weight,
        feedback,
        has_given,
        has_truth,
        from_strong,
        n_unlabeled,
        ignore_index,
        num_classes,
        temperature,
        threshold,
        label_smoothing,
    )
    part, label, kept, gradient = _outputs(x, request, stats, grad)
    rows, width = x.shape
    if rows == 0:
        return part, label, kept, gradient
    config = launch_config(width)
    unread = [uda_weight] * (4 - len(upstream))
    # Triton launches on the current device, not on the tensors'.
    with torch.cuda.device_of(x):
        wrap_triton(teacher_kernel, x, rows - n_unlabeled, config.warps)(
            x,
            x.stride(0),
            gradient,
            width,
            target,
            given,
            truth,
            label,
            part,
            kept if stats else saved,
            uda_weight,
            feedback,
            *upstream,
            *unread,
            rows - 2 * n_unlabeled,
            n_unlabeled,
            1.0 / temperature,
            float(threshold),
            float(label_smoothing),
            ignore_index,
            C=num_classes,
            W=width,
            STATS=stats,
            GRAD=grad,
            UPSTREAM=len(upstream),
            GIVEN=has_given,
            FROM_STRONG=from_strong,
            HAS_TRUTH=has_truth,
            ALIGN=align(x.stride(0), width),
            SINGLE=config.single,
            BLOCK=config.block,
        )
    return part, label, kept, gradient


teacher = register("mpl_fast::teacher", _launch, _fake)
