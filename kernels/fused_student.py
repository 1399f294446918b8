"""The student's loss with its Triton kernel: as a function with a gradient, and with it in one go.

`student_loss` launches forward and again in its backward pass, which takes the gradient anew from
the logits: that is exact for every gradient from above, and 16-bit gradients are rounded once,
after it is multiplied in. `student_loss_and_grad` needs one launch for both.
"""

from typing import Any, cast

import torch
from torch import Tensor

from mpl_fast.kernels.launch import (
    align,
    constants,
    launch_config,
    no_second_derivative,
    register,
    wrap_triton,
)
from mpl_fast.kernels.outputs import StudentOut
from mpl_fast.kernels.student import STATISTICS, student_kernel


def student_loss(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
) -> StudentOut:
    """`losses.student_loss`. 2 launches forward, 1 backward; logits read twice, written once."""
    x, labels, weighted = _rows(logits), _rows(pseudo.detach()), weight is not None
    out = _StudentLoss.apply(
        x,
        labels,
        _targets(target, x),
        x.detach() if weight is None else weight.detach().contiguous(),
        weighted,
        label_smoothing,
        temperature,
        logits.shape[1] if num_classes is None else num_classes,
    )
    loss, *statistics = cast(tuple[Tensor, ...], out)
    return StudentOut(loss, *constants(statistics))


def student_loss_and_grad(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
    grad_scale: Tensor | None = None,
) -> tuple[StudentOut, Tensor]:
    """`losses.student_loss_and_grad`. 2 launches; logits read once, a gradient written once."""
    x, labels = _rows(logits.detach()), _rows(pseudo.detach())
    part, _, gradient = _student(
        x,
        labels,
        _targets(target, x),
        x if weight is None else weight.detach().contiguous(),
        x if grad_scale is None else grad_scale.detach(),
        x,
        weight is not None,
        grad_scale is not None,
        True,
        True,
        label_smoothing,
        temperature,
        logits.shape[1] if num_classes is None else num_classes,
    )
    return StudentOut(*part.sum(1).unbind()), gradient


class _StudentLoss(torch.autograd.Function):
    """Keeps the logits, and of each row what took a whole row to find."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pseudo: Tensor,
        target: Tensor,
        weight: Tensor,
        weighted: bool,
        label_smoothing: float,
        temperature: float,
        num_classes: int,
    ) -> tuple[Tensor, ...]:
        settings = (label_smoothing, temperature, num_classes)
        part, saved, _ = _student(
            x, pseudo, target, weight, x, x, weighted, False, True, False, *settings
        )
        if not torch.compiler.is_compiling():  # it cannot trace this
            ctx.set_materialize_grads(False)  # zeros of what has no gradient would be launches
        statistics = part.sum(1).unbind()
        ctx.save_for_backward(x, pseudo, target, weight, saved)
        ctx.weighted, ctx.settings = weighted, settings
        ctx.mark_non_differentiable(*statistics[1:])
        return statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        if upstream is None:
            return (None,) * 8
        x, pseudo, target, weight, saved = ctx.saved_tensors
        outputs = _student(
            x,
            pseudo,
            target,
            weight,
            upstream,
            saved,
            ctx.weighted,
            True,
            False,
            True,
            *ctx.settings,
        )
        return outputs[2], None, None, None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """The same numbers, with neighbors in a row next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _targets(target: Tensor | None, x: Tensor) -> Tensor:
    """(L,) int64, of no rows if there are none."""
    return x.new_empty(0, dtype=torch.int64) if target is None else target.contiguous()


def _outputs(x: Tensor, pseudo: Tensor, stats: bool, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_launch` returns, of unwritten memory."""
    rows, width = x.shape
    part = x.new_empty((len(STATISTICS), rows if stats else 0), dtype=torch.float32)
    kept = (4 if pseudo.dim() == 2 else 2, pseudo.shape[0] if stats and not grad else 0)
    return part, x.new_empty(kept, dtype=torch.float32), x.new_empty((rows if grad else 0, width))


def _fake(x: Tensor, pseudo: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, stats, grad, _, _, _ = arguments
    return _outputs(x, pseudo, stats, grad)


def _launch(
    x: Tensor,
    pseudo: Tensor,
    target: Tensor,
    weight: Tensor,
    upstream: Tensor,
    saved: Tensor,
    weighted: bool,
    scaled: bool,
    stats: bool,
    grad: bool,
    label_smoothing: float,
    temperature: float,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics (len(STATISTICS), rows), what a gradient needs of strong rows, gradient (rows, W).

    What is not asked for is empty. saved: the second of these, where only the gradient is asked
    for.
    """
    part, kept, gradient = _outputs(x, pseudo, stats, grad)
    (rows, width), n_u = x.shape, pseudo.shape[0]
    if rows == 0:
        return part, kept, gradient
    soft, config = pseudo.dim() == 2, launch_config(width)
    pitch = pseudo.stride(0) if soft else 0
    # Triton launches on the current device, not on the tensors'.
    with torch.cuda.device_of(x):
        wrap_triton(student_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            gradient,
            target,
            pseudo,
            pseudo if soft else x,
            pitch,
            weight,
            upstream,
            kept if stats else saved,
            part,
            rows - n_u,
            n_u,
            1.0 / temperature,
            float(label_smoothing),
            C=num_classes,
            W=width,
            SOFT=soft,
            WEIGHTED=weighted,
            SCALED=scaled,
            STATS=stats,
            GRAD=grad,
            ALIGN=align(x.stride(0), pitch),
            SINGLE=config.single,
            BLOCK=config.block,
        )
    return part, kept, gradient


_student = register("mpl_fast::student", _launch, _fake)
