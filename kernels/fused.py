"""The losses with Triton: one launch and one sum for the teacher's and the labeled loss.

The kernel writes the gradient of ``loss`` along with its value; the backward pass only multiplies
that by what comes from above. Pseudo labels and the student's loss are plain PyTorch still.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import CEOut, Pseudo, Scalar, TeacherOut
from mpl_fast.kernels.reference import pseudo_labels as pseudo_labels
from mpl_fast.kernels.reference import student_loss as student_loss
from mpl_fast.kernels.teacher import STATISTICS, teacher_kernel


class Launch(NamedTuple):
    """How a row of a given width is cut into blocks."""

    block: int  # columns
    single: bool  # the whole row is one block, kept in registers
    warps: int


class Request(NamedTuple):
    """What the kernel needs besides tensors that a gradient could flow to."""

    target: Tensor  # (L,) int64
    n_unlabeled: int
    uda_weight: Tensor  # 0-dim float32
    feedback: Tensor  # 0-dim float32
    temperature: float
    threshold: float
    label_smoothing: float
    pseudo: Pseudo
    truth: Tensor | None
    ignore_index: int
    num_classes: int
    wants_grad: bool


def launch_config(width: int) -> Launch:
    """Few warps for each row: more of them wait for one another instead of for memory.

    Chosen by instruction counts of the compiled code for sm_90 against its memory time, not by
    timing; up to 8192 columns no configuration here spills registers.
    """
    block = max(16, 1 << (width - 1).bit_length())
    if block > 8192:
        return Launch(2048, False, 4)
    return Launch(block, True, max(1, block // 1024))


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
    """See `reference.teacher_loss`. 1 launch and 1 sum forward, 1 product backward."""
    request = Request(
        target=target.contiguous(),
        n_unlabeled=n_unlabeled,
        uda_weight=_on_device(uda_weight, logits),
        feedback=_on_device(feedback, logits),
        temperature=temperature,
        threshold=threshold,
        label_smoothing=label_smoothing,
        pseudo=pseudo.contiguous() if isinstance(pseudo, Tensor) else pseudo,
        truth=None if truth is None else truth.contiguous(),
        ignore_index=ignore_index,
        num_classes=logits.shape[1] if num_classes is None else num_classes,
        wants_grad=torch.is_grad_enabled() and logits.requires_grad,
    )
    loss, statistics, label = _apply(logits, request)
    seen = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    del seen["loss"], seen["labeled_accuracy"]
    return TeacherOut(loss=loss, label=label, **seen)


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """See `reference.smoothed_ce`: the teacher's kernel without unlabeled rows."""
    request = Request(
        target=target.contiguous(),
        n_unlabeled=0,
        uda_weight=_on_device(0.0, logits),
        feedback=_on_device(0.0, logits),
        temperature=1.0,
        threshold=0.0,
        label_smoothing=label_smoothing,
        pseudo="weak",
        truth=None,
        ignore_index=ignore_index,
        num_classes=logits.shape[1] if num_classes is None else num_classes,
        wants_grad=torch.is_grad_enabled() and logits.requires_grad,
    )
    loss, statistics, _ = _apply(logits, request)
    return CEOut(loss, statistics[STATISTICS.index("labeled_accuracy")])


class _FusedLoss(torch.autograd.Function):
    """Keeps the gradient that the kernel wrote."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        part, label, gradient = _launch(logits, request)
        ctx.save_for_backward(gradient)
        statistics = part.sum(1)
        loss = statistics[0].clone()
        ctx.mark_non_differentiable(statistics, label)
        return loss, statistics, label

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient would pass for a constant
            raise RuntimeError(
                "the fused losses have no second derivative; use losses.use('reference')"
            )
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


def _apply(logits: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """loss, statistics (len(STATISTICS),) and labels (U,)."""
    out = _FusedLoss.apply(logits, request)
    return cast(tuple[Tensor, Tensor, Tensor], out)


def _launch(logits: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Partial statistics (len(STATISTICS), L + U), labels (U,), gradient (empty if unasked)."""
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    n_l, n_u, width = len(request.target), request.n_unlabeled, x.shape[1]
    part = x.new_empty((len(STATISTICS), n_l + n_u), dtype=torch.float32)
    label = request.target.new_empty(n_u)
    gradient = x.new_empty(x.shape if request.wants_grad else (0, width))
    if n_l + n_u == 0:
        return part, label, gradient
    config = launch_config(width)
    given = request.pseudo if isinstance(request.pseudo, Tensor) else label
    # Triton launches on the current device, not on the tensors'.
    with torch.cuda.device_of(x):
        teacher_kernel[(n_l + n_u,)](
            x,
            x.stride(0),
            gradient,
            width,
            request.target,
            given,
            label if request.truth is None else request.truth,
            label,
            part,
            request.uda_weight,
            request.feedback,
            n_l,
            n_u,
            1.0 / max(n_l, 1),
            1.0 / max(n_u, 1),
            1.0 / request.temperature,
            float(request.threshold),
            float(request.label_smoothing),
            request.ignore_index,
            C=request.num_classes,
            W=width,
            HAS_GRAD=request.wants_grad,
            GIVEN=given is not label,
            FROM_STRONG=given is label and request.pseudo == "strong",
            HAS_TRUTH=request.truth is not None,
            ALIGN=math.gcd(x.stride(0), width, 16),
            SINGLE=config.single,
            BLOCK=config.block,
            num_warps=config.warps,
            enable_fp_fusion=True,  # said aloud, since Triton 3.9 warns about its changing default
        )
    return part, label, gradient


def _on_device(value: Scalar, like: Tensor) -> Tensor:
    """A 0-dim float32 on the device of `like`: filled there, since a copy would synchronize."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, torch.float32, non_blocking=True)
    return torch.full((), value, device=like.device)
