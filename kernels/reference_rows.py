"""The losses that look at one row at a time, in plain PyTorch."""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import CEOut, CosineOut, PseudoLabels, Scalar
from mpl_fast.kernels.reference_math import (
    constant,
    expected,
    label_ce,
    lift,
    match,
    mean,
    outside,
    sharpen,
    sharpened,
)


def pseudo_labels(
    weak: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    num_classes: int | None = None,
) -> PseudoLabels:
    """Each row's label, confidence and entropy under p = softmax(weak / temperature).

    The label is the arg-max, or drawn from p by a uniform number.
    """
    weak = lift(weak.detach(), num_classes)
    p, log_p, confidence = sharpen(weak, temperature)
    label = weak.argmax(-1) if uniforms is None else _drawn(p, uniforms)
    return PseudoLabels(label, confidence.float(), (-expected(p, log_p)).float())


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """Mean over all rows N of CE((1 - a) 1[target] + a / C, softmax(logits)).

    An ignored row adds 0 to the sum and still counts in N, so that the denominator is a constant.
    """
    x = lift(logits, num_classes)
    rows = label_ce(x, target, label_smoothing, ignore_index)
    return CEOut(mean(rows), match(x.argmax(-1), target))


def cosine_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    threshold: float = 0.0,
    num_classes: int | None = None,
) -> CosineOut:
    """Mean over all rows of 1[max q >= threshold] * (1 - cos(softmax(logits), q)).

    q: a constant, softmax(target / temperature), or one-hot where target holds classes.
    """
    x = lift(logits, num_classes)
    if target.dim() == 2:
        q, _, confidence = sharpen(target.detach()[:, : x.shape[1]].to(x.dtype), temperature)
    else:
        bad = outside(target, x)
        q = (target[:, None] == torch.arange(x.shape[1], device=x.device)).to(x.dtype)
        q = torch.where(bad[:, None], torch.nan, q)
        confidence = torch.ones_like(x[:, 0])
    p = x.softmax(-1)
    cosine = (p * q).sum(-1) / ((p * p).sum(-1) * (q * q).sum(-1)).sqrt()
    mask = (confidence >= threshold).to(x.dtype)
    return CosineOut(mean(mask * (1.0 - cosine)), mean(mask).float())


def exact_feedback(
    logits: Tensor,
    direction: Tensor,
    *,
    weight: Scalar,
    temperature: float = 1.0,
    num_classes: int | None = None,
) -> Tensor:
    """weight * mean over rows of sum_c direction_c softmax(logits / temperature)_c."""
    x = lift(logits, num_classes)
    q = sharpened(x, temperature).softmax(-1)
    u = direction.detach()[:, : x.shape[1]].to(x.dtype)
    return constant(weight, x) * mean((q * u).sum(-1))


def _drawn(p: Tensor, uniforms: Tensor) -> Tensor:
    """The first possible class whose cumulated p exceeds the number; else the last possible one."""
    classes = p.shape[-1]
    index = torch.arange(classes, device=p.device)
    steps = p.cumsum(-1)
    # A GPU adds up in a tree, whose sums may rise by a rounding at a class that adds nothing.
    above = (steps > uniforms[:, None] * steps[:, -1:]) & (p > 0)
    first = torch.where(above, index, classes).amin(-1)
    last = torch.where(p > 0, index, 0).amax(-1)
    return torch.where(first < classes, first, last)
