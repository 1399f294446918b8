"""The student's loss, its gradient, and the feedback to its teacher, in plain PyTorch."""

import math

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import StudentOut
from mpl_fast.kernels.reference_math import (
    label_ce,
    lift,
    match,
    mean,
    scaled,
    sharpen,
    soft_ce,
)

# A target to leave out, as `smoothed_ce` leaves it out by default: old and new must be alike.
IGNORED = -100


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
    """Mean over U of weight_i * CE_smoothed(pseudo_i, strong_i), over rows labeled | strong.

    pseudo: classes (U,), or logits (U, W) whose softmax(. / temperature) is the target. Labeled
    rows are only looked at: their CE is unsmoothed and has no gradient.
    """
    x = lift(logits, num_classes)
    strong = x[x.shape[0] - pseudo.shape[0] :]
    if pseudo.dim() == 2:
        q, _, _ = sharpen(pseudo.detach()[:, : x.shape[1]].to(x.dtype), temperature)
        rows = soft_ce(strong, q, label_smoothing)
    else:
        rows = label_ce(strong, pseudo, label_smoothing)
    loss = mean(rows if weight is None else rows * weight.detach().to(x.dtype))
    if target is None:
        zero = torch.zeros((), device=x.device)
        return StudentOut(loss, zero, zero)
    labeled = x[: target.shape[0]].detach()
    seen = mean(label_ce(labeled, target, 0.0, IGNORED)).float()
    return StudentOut(loss, seen, match(labeled.argmax(-1), target))


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
    """`student_loss` without gradients, and grad_scale * d loss / d logits like logits."""

    def differentiated(x: Tensor) -> tuple[Tensor, StudentOut]:
        out = student_loss(
            x,
            pseudo,
            target,
            label_smoothing=label_smoothing,
            temperature=temperature,
            weight=weight,
            num_classes=num_classes,
        )
        return scaled(out.loss, grad_scale), out

    gradient, out = torch.func.grad(differentiated, has_aux=True)(logits.detach())
    return out, gradient


def mpl_feedback(
    old: Tensor, new: Tensor, average: Tensor | None = None, *, momentum: float = 0.99
) -> Tensor:
    """h = old - new, less its running mean if given, which moves first and in place.

    It is not moved by what is not finite. The order is the official code's (class MPL of its
    training_utils.py); the sign is the paper's and not that code's.
    """
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    h = (old.detach().to(wide) - new.detach().to(wide)).float()
    if average is None:
        return h
    # What is not finite would stay in the mean for good. NaN is not less than infinity either.
    average.lerp_(torch.where(h.abs() < math.inf, h, average), 1.0 - momentum)
    return h - average
