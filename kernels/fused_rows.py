"""Pseudo labels, the cosine loss and the exact feedback with their Triton kernels.

The losses launch forward and again in their backward pass, which takes the gradient anew from the
logits: that is exact for every gradient from above.
"""

from typing import Any, cast

import torch
from torch import Tensor

from mpl_fast.kernels import row_ops
from mpl_fast.kernels.launch import constants, no_second_derivative, on_device
from mpl_fast.kernels.outputs import CosineOut, PseudoLabels, Scalar


def pseudo_labels(
    weak: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    num_classes: int | None = None,
) -> PseudoLabels:
    """`losses.pseudo_labels`. 1 launch; logits read once, of wide rows twice to draw a label.

    Cumulative sums are taken in float32, and in a tree: a uniform number within their rounding of
    the border between two classes may fall to either.
    """
    x = _rows(weak.detach())
    label, confidence, entropy = row_ops.pseudo(
        x,
        x if uniforms is None else uniforms.detach().contiguous(),
        uniforms is not None,
        temperature,
        weak.shape[1] if num_classes is None else num_classes,
    )
    return PseudoLabels(label, confidence, entropy)


def cosine_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    threshold: float = 0.0,
    num_classes: int | None = None,
) -> CosineOut:
    """`losses.cosine_loss`. 2 launches forward, 1 backward; all is read twice, written once."""
    out = _CosineLoss.apply(
        _rows(logits),
        _rows(target.detach()),
        temperature,
        threshold,
        logits.shape[1] if num_classes is None else num_classes,
    )
    loss, rate = cast(tuple[Tensor, Tensor], out)
    return CosineOut(loss, *constants([rate]))


def exact_feedback(
    logits: Tensor,
    direction: Tensor,
    *,
    weight: Scalar,
    temperature: float = 1.0,
    num_classes: int | None = None,
) -> Tensor:
    """`losses.exact_feedback`. 2 launches forward, 1 backward; all read twice, written once.

    A weight that is a number takes one launch more, which writes it to the device.
    """
    out = _ExactFeedback.apply(
        _rows(logits),
        _rows(direction.detach()),
        on_device(weight, logits),
        temperature,
        logits.shape[1] if num_classes is None else num_classes,
    )
    return cast(Tensor, out)


class _CosineLoss(torch.autograd.Function):
    """Keeps the logits, and of each row what took a whole row to find."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        temperature: float,
        threshold: float,
        num_classes: int,
    ) -> tuple[Tensor, Tensor]:
        part, saved = row_ops.cosine(x, target, temperature, threshold, num_classes)
        if not torch.compiler.is_compiling():  # it cannot trace this
            ctx.set_materialize_grads(False)  # a zero of what has no gradient would be a launch
        loss, mask_rate = part.sum(1).unbind()
        ctx.save_for_backward(x, target, saved)
        ctx.settings = temperature, num_classes
        ctx.mark_non_differentiable(mask_rate)
        return loss, mask_rate

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        if upstream is None:
            return (None,) * 5
        x, target, saved = ctx.saved_tensors
        gradient = row_ops.cosine_gradient(x, target, saved, upstream, *ctx.settings)
        return gradient, None, None, None, None


class _ExactFeedback(torch.autograd.Function):
    """Keeps the logits, and of each row what took a whole row to find."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        direction: Tensor,
        weight: Tensor,
        temperature: float,
        num_classes: int,
    ) -> Tensor:
        part, saved = row_ops.exact(x, direction, weight, temperature, num_classes)
        ctx.save_for_backward(x, direction, weight, saved)
        ctx.settings = temperature, num_classes
        return part.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        x, direction, weight, saved = ctx.saved_tensors
        gradient = row_ops.exact_gradient(x, direction, weight, saved, upstream, *ctx.settings)
        return gradient, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """The same numbers, with neighbors in a row next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
