"""The teacher's loss and its gradient, in plain PyTorch."""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import Pseudo, Scalar, TeacherOut
from mpl_fast.kernels.reference_math import (
    constant,
    expected,
    label_ce,
    lift,
    match,
    mean,
    scaled,
    sharpen,
    soft_ce,
)


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
    """loss = sup + uda_weight * uda + feedback * mpl, over rows labeled | weak | strong.

    With q = softmax(weak / temperature), a constant, and each mean over all rows of its kind:

        sup = mean CE_smoothed(target, labeled)
        uda = mean 1[max q >= threshold] * CE(q, strong)
        mpl = mean CE(y, strong)
    """
    x = lift(logits, num_classes)
    n_labeled = target.shape[0]
    labeled, strong = x[:n_labeled], x[n_labeled + n_unlabeled :]
    weak = x[n_labeled : n_labeled + n_unlabeled].detach()
    q, log_q, confidence = sharpen(weak, temperature)
    mask = (confidence >= threshold).to(x.dtype)
    label = _labels(pseudo, weak, strong)
    sup = mean(label_ce(labeled, target, label_smoothing, ignore_index))
    uda = mean(mask * soft_ce(strong, q, 0.0))  # times and not where: NaN must survive
    mpl = mean(label_ce(strong, label, 0.0))
    return TeacherOut(
        loss=sup + constant(uda_weight, x) * uda + constant(feedback, x) * mpl,
        sup=sup,
        uda=uda,
        mpl=mpl,
        mask_rate=mean(mask).float(),
        confidence=mean(confidence).float(),
        entropy=mean(-expected(q, log_q)).float(),
        pseudo_accuracy=mean(mask * 0.0).float() if truth is None else match(label, truth),
        label=label,
    )


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
    """`teacher_loss` without gradients, and grad_scale * d loss / d logits like logits."""

    def differentiated(x: Tensor) -> tuple[Tensor, TeacherOut]:
        out = teacher_loss(
            x,
            target,
            n_unlabeled,
            uda_weight=uda_weight,
            feedback=feedback,
            temperature=temperature,
            threshold=threshold,
            label_smoothing=label_smoothing,
            pseudo=pseudo,
            truth=truth,
            ignore_index=ignore_index,
            num_classes=num_classes,
        )
        return scaled(out.loss, grad_scale), out

    gradient, out = torch.func.grad(differentiated, has_aux=True)(logits.detach())
    return out, gradient


def _labels(pseudo: Pseudo, weak: Tensor, strong: Tensor) -> Tensor:
    """The pseudo labels (U,)."""
    if isinstance(pseudo, Tensor):
        return pseudo
    return (weak if pseudo == "weak" else strong.detach()).argmax(-1)
