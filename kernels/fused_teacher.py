"""The teacher's and the labeled loss with their Triton kernel, and two ways to the gradient.

`teacher_loss` and `smoothed_ce` read the logits once and write no gradient. Their backward pass
launches the kernel again, which then knows what arrives from above for each term: exact for any
combination, and a 16-bit gradient is rounded once, after that is multiplied in. A gradient written
ahead of time would need a pass over it for each.
`teacher_loss_and_grad` has one launch for both, since it is told at once what will arrive.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mpl_fast.kernels.launch import constants, no_second_derivative, on_device
from mpl_fast.kernels.outputs import CEOut, Pseudo, Scalar, TeacherOut
from mpl_fast.kernels.teacher_op import Request, teacher

DIFFERENTIABLE = 4  # the first of STATISTICS: loss, sup, uda, mpl
NUMBERS = Request._fields.index("n_unlabeled")  # the first that is no tensor and no flag of one


def teacher_loss(
    logits: Tensor,
    target: Tensor,
    n_unlabeled: int,
    *,
    uda_weight: Scalar,
    feedback: Scalar,
    temperature: float = 1.0,
    threshold: float = 0.0,
    label_smoothing: float = 0.0,
    pseudo: Pseudo = "weak",
    truth: Tensor | None = None,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> TeacherOut:
    """`losses.teacher_loss`. 2 launches forward, 1 backward; 1 for each weight that is a number.

    The terms are views of one tensor: PyTorch refuses to change them in place.
    """
    request = _request(
        logits,
        target,
        n_unlabeled,
        uda_weight,
        feedback,
        temperature,
        threshold,
        label_smoothing,
        pseudo,
        truth,
        ignore_index,
        num_classes,
    )
    *statistics, label = _apply(logits, request)
    return _teacher_out(statistics, label)


def teacher_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    n_unlabeled: int,
    *,
    uda_weight: Scalar,
    feedback: Scalar,
    temperature: float = 1.0,
    threshold: float = 0.0,
    label_smoothing: float = 0.0,
    pseudo: Pseudo = "weak",
    truth: Tensor | None = None,
    ignore_index: int = -100,
    num_classes: int | None = None,
    grad_scale: Tensor | None = None,
) -> tuple[TeacherOut, Tensor]:
    """`losses.teacher_loss_and_grad`. 2 launches; 1 for each weight that is a number."""
    request = _request(
        logits,
        target,
        n_unlabeled,
        uda_weight,
        feedback,
        temperature,
        threshold,
        label_smoothing,
        pseudo,
        truth,
        ignore_index,
        num_classes,
    )
    x = _rows(logits.detach())
    upstream = [] if grad_scale is None else [on_device(grad_scale, x)]
    part, label, _, gradient = teacher(x, *request, x, upstream, True, True)
    return _teacher_out(part.sum(1).unbind(), label), gradient


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """`losses.smoothed_ce`: the teacher's kernel without unlabeled rows, 2 launches and 1."""
    unread = logits.new_empty((), dtype=torch.float32)
    request = _request(
        logits,
        target,
        0,
        unread,
        unread,
        1.0,
        0.0,
        label_smoothing,
        "weak",
        None,
        ignore_index,
        num_classes,
    )
    loss, *_, accuracy, _ = _apply(logits, request)
    return CEOut(loss, accuracy)


class _TeacherLoss(torch.autograd.Function):
    """Keeps the logits, and of each row what took a whole row to find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *fields: Any) -> tuple[Tensor, ...]:
        request = Request(*fields)
        part, label, saved, _ = teacher(x, *request, x, [], True, False)
        if not torch.compiler.is_compiling():  # it cannot trace this
            ctx.set_materialize_grads(False)  # zeros of what nobody asked for would be launches
        ctx.save_for_backward(x, request.target, label, request.uda_weight, request.feedback, saved)
        ctx.numbers = request[NUMBERS:]
        statistics = part.sum(1).unbind()
        ctx.mark_non_differentiable(*statistics[DIFFERENTIABLE:], label)
        return *statistics, label

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        arrived = _arrived(upstream[:DIFFERENTIABLE])
        if not arrived:
            return (None,) * (1 + len(Request._fields))
        x, target, label, uda_weight, feedback, saved = ctx.saved_tensors
        request = Request(
            target, label, label, uda_weight, feedback, True, False, False, *ctx.numbers
        )
        *_, gradient = teacher(x, *request, saved, arrived, False, True)
        return gradient, *(None for _ in request)


def _arrived(upstream: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Gradients of loss, sup, uda and mpl; or of loss alone, or none, where no other came."""
    here = [u for u in upstream if u is not None]
    if len(here) in (0, len(upstream)) or (len(here) == 1 and upstream[0] is not None):
        return here
    zero = torch.zeros_like(here[0])
    return [zero if u is None else u for u in upstream]


def _request(
    logits: Tensor,
    target: Tensor,
    n_unlabeled: int,
    uda_weight: Scalar,
    feedback: Scalar,
    temperature: float,
    threshold: float,
    label_smoothing: float,
    pseudo: Pseudo,
    truth: Tensor | None,
    ignore_index: int,
    num_classes: int | None,
) -> Request:
    # Detached not for a gradient's sake: the compiler takes no tensor twice, and a caller may give
    # the same labels for two of these.
    return Request(
        target=target.detach().contiguous(),
        given=(pseudo if isinstance(pseudo, Tensor) else target).detach().contiguous(),
        truth=(target if truth is None else truth).detach().contiguous(),
        uda_weight=on_device(uda_weight, logits),
        feedback=on_device(feedback, logits),
        has_given=isinstance(pseudo, Tensor),
        has_truth=truth is not None,
        from_strong=isinstance(pseudo, str) and pseudo == "strong",
        n_unlabeled=n_unlabeled,
        ignore_index=ignore_index,
        num_classes=logits.shape[1] if num_classes is None else num_classes,
        temperature=temperature,
        threshold=threshold,
        label_smoothing=label_smoothing,
    )


def _teacher_out(statistics: Sequence[Tensor], label: Tensor) -> TeacherOut:
    loss, sup, uda, mpl, mask_rate, confidence, entropy, pseudo_accuracy, _ = statistics
    return TeacherOut(loss, sup, uda, mpl, mask_rate, confidence, entropy, pseudo_accuracy, label)


def _rows(logits: Tensor) -> Tensor:
    """The same numbers, with neighbors in a row next to each other in memory."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _apply(logits: Tensor, request: Request) -> tuple[Tensor, ...]:
    """Each of STATISTICS, and labels (U,)."""
    out = cast(tuple[Tensor, ...], _TeacherLoss.apply(_rows(logits), *request))
    return *out[:DIFFERENTIABLE], *constants(out[DIFFERENTIABLE:])
