"""The losses in plain PyTorch: the definition that every kernel is tested against.

They run on any device and in any float type. 16-bit logits are converted to float32 first; float64
stays float64, which makes it the oracle of the tests. No value of a tensor is read on the host.
Arguments are those that `mpl_fast.losses` has checked and documents; a label out of range makes the
loss NaN instead of raising an error, since finding it would need a synchronization.

x: (N, C) logits, at least float32. p, q: (N, C) distributions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.kernels.outputs import (
    CEOut,
    CosineOut,
    Dual,
    Pseudo,
    PseudoLabels,
    Scalar,
    TeacherInputs,
    TeacherOut,
)


def pseudo_labels(weak: Tensor, uniforms: Tensor | None) -> PseudoLabels:
    """`losses.pseudo_labels`."""
    weak = _wide(weak.detach())
    p, log_p, confidence = _sharpen(weak, 1.0)
    label = weak.argmax(-1) if uniforms is None else _sample(p, uniforms)
    return PseudoLabels(label, confidence.float(), (-_expected(p, log_p)).float())


def smoothed_ce(logits: Tensor, target: Tensor, label_smoothing: float) -> CEOut:
    """`losses.smoothed_ce`."""
    x = _wide(logits)
    return CEOut(_mean(_hard_ce(x, target, label_smoothing)), _match(x.argmax(-1), target))


def student_loss(
    logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor:
    """`losses.student_loss`."""
    x = _wide(logits)
    if pseudo.dim() == 2:
        q, _, _ = _sharpen(pseudo.detach().to(x.dtype), 1.0)
        rows = _soft_ce(x, q, label_smoothing)
    else:
        rows = _hard_ce(x, pseudo, label_smoothing)
    return _mean(rows if weight is None else rows * weight.detach().to(x.dtype))


def student_loss_and_grad(
    logits: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`student_loss` without autograd, and d loss / d logits of the logits' shape and type."""
    gradient, loss = torch.func.grad_and_value(student_loss)(
        logits.detach(), pseudo, label_smoothing, weight
    )
    return loss, gradient


def teacher_loss(inputs: TeacherInputs) -> TeacherOut:
    """The terms of `losses.teacher_loss_and_grad`, which autograd differentiates."""
    x, n_labeled = _wide(inputs.logits), inputs.target.shape[0]
    labeled, strong = x[:n_labeled], x[n_labeled + inputs.n_unlabeled :]
    weak = x[n_labeled : n_labeled + inputs.n_unlabeled].detach()
    q, log_q, confidence = _sharpen(weak, inputs.temperature)
    mask = (confidence >= inputs.threshold).to(x.dtype)
    label = _labels(inputs.pseudo, weak, strong)
    sup = _mean(_hard_ce(labeled, inputs.target, inputs.label_smoothing))
    uda = _mean(mask * _soft_ce(strong, q, 0.0))  # times and not where: NaN must propagate
    mpl = _mean(_hard_ce(strong, label, 0.0))
    truth = inputs.truth
    return TeacherOut(
        loss=sup + _constant(inputs.uda_weight, x) * uda + _constant(inputs.feedback, x) * mpl,
        sup=sup,
        uda=uda,
        mpl=mpl,
        mask_rate=_mean(mask).float(),
        confidence=_mean(confidence).float(),
        entropy=_mean(-_expected(q, log_q)).float(),
        pseudo_accuracy=_mean(mask * 0.0).float() if truth is None else _match(label, truth),
        label=label,
    )


def teacher_loss_and_grad(inputs: TeacherInputs) -> tuple[TeacherOut, Tensor]:
    """`teacher_loss` without autograd, and d loss / d logits of the logits' shape and type."""

    def differentiated(x: Tensor) -> tuple[Tensor, TeacherOut]:
        out = teacher_loss(inputs._replace(logits=x))
        return out.loss, out

    gradient, out = torch.func.grad(differentiated, has_aux=True)(inputs.logits.detach())
    return out, gradient


def cosine_loss(logits: Tensor, target: Tensor, temperature: float, threshold: float) -> CosineOut:
    """`losses.cosine_loss`."""
    x = _wide(logits)
    q, _, confidence = _sharpen(target.detach().to(x.dtype), temperature)
    p = x.softmax(-1)
    cosine = (p * q).sum(-1) / ((p * p).sum(-1) * (q * q).sum(-1)).sqrt()
    mask = (confidence >= threshold).to(x.dtype)
    return CosineOut(_mean(mask * (1.0 - cosine)), _mean(mask).float())


def exact_feedback(logits: Tensor, direction: Tensor, weight: Scalar) -> Tensor:
    """`losses.exact_feedback`."""
    x = _wide(logits)
    q = _scaled(x, 1.0).softmax(-1)
    return _constant(weight, x) * _mean((q * direction.detach().to(x.dtype)).sum(-1))


def mpl_feedback(
    old: Tensor, new: Tensor, average: Tensor | None = None, *, momentum: float = 0.99
) -> Tensor:
    """`losses.mpl_feedback`; the official code has it in class MPL of its training_utils.py."""
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    h = (old.detach().to(wide) - new.detach().to(wide)).float()
    if average is None:
        return h
    # NaN or infinity would stay in the mean for good. NaN is not less than infinity either.
    average.lerp_(torch.where(h.abs() < math.inf, h, average), 1.0 - momentum)
    return h - average


def batch_norm_jvp(
    x: Dual,
    weight: Dual,
    bias: Dual,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    slope: float,
) -> Dual:
    """Batch norm and a leaky ReLU, with their derivative along the tangents; no gradient flows.

    x: (N, C, ...) floating point. weight, bias: (C,). given: the mean and the variance of each
    channel, (C,), taken as constants; None: those of the batch, and their derivatives. slope: of
    the ReLU below 0; 1 is none. Returns y and dy of x's shape and type, and arithmetic is at least
    float32. Ioffe and Szegedy, arXiv 1502.03167, differentiated by the chain rule.
    """
    shape = [1, -1] + [1] * (x.primal.dim() - 2)
    primal, e, w, dw, b, db = map(_wide, (*x, *weight, *bias))
    w, dw, b, db = (tensor.view(shape) for tensor in (w, dw, b, db))
    if given is None:
        d, e = primal - _channel_mean(primal), e - _channel_mean(e)
        scale = (_channel_mean(d * d) + eps).rsqrt()
        along = dw * scale - w * scale**3 * _channel_mean(d * e)
    else:
        mean, var = (_wide(tensor).view(shape) for tensor in given)
        d, scale = primal - mean, (var + eps).rsqrt()
        along = dw * scale
    y = torch.addcmul(b, d, w * scale)
    dy = torch.addcmul(db, d, along).addcmul_(e, w * scale)
    if slope != 1.0:
        dy = torch.ops.aten.leaky_relu_backward(dy, y, slope, False)
        y = F.leaky_relu_(y, slope)
    return Dual(y.to(x.primal.dtype), dy.to(x.primal.dtype))


def _channel_mean(x: Tensor) -> Tensor:
    """(1, C, 1, ...). On a CPU `torch.var_mean` takes many times as long."""
    return x.mean([axis for axis in range(x.dim()) if axis != 1], keepdim=True)


def _wide(logits: Tensor) -> Tensor:
    """The logits, at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _sharpen(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(x / temperature), its logarithm, and its largest entry (exactly 1 / sum)."""
    distance = _scaled(x, temperature)
    log_p = distance.log_softmax(-1)
    return log_p.exp(), log_p, 1.0 / distance.exp().sum(-1)


def _scaled(x: Tensor, temperature: float) -> Tensor:
    """x / temperature up to a constant of the row, so that its largest entry is 0."""
    # Subtract first: x / temperature overflows where the temperature is tiny.
    return (x - x.detach().amax(-1, keepdim=True)) / temperature


def _expected(p: Tensor, value: Tensor) -> Tensor:
    """Sum of p * value along a row, where an impossible class adds 0 even if its value is -inf."""
    # p * 0 and not 0, so that a NaN in p propagates.
    return torch.where(p > 0, p * value, p * 0.0).sum(-1)


def _hard_ce(x: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """CE of each row (N,) with classes (N,); NaN for a class out of range."""
    log_p = x.log_softmax(-1)
    bad = (label < 0) | (label >= x.shape[-1])
    at = torch.where(bad, 0, label)
    loss = _smoothed(-log_p.gather(-1, at[:, None])[:, 0], log_p, smoothing)
    # Times NaN and not instead of it: the gradient has to be NaN, too.
    return loss * torch.where(bad, torch.nan, 1.0)


def _soft_ce(x: Tensor, q: Tensor, smoothing: float) -> Tensor:
    """CE of each row (N,) with distributions q."""
    log_p = x.log_softmax(-1)
    return _smoothed(-_expected(q, log_p), log_p, smoothing)


def _smoothed(ce: Tensor, log_p: Tensor, smoothing: float) -> Tensor:
    """(1 - a) CE(target) + a CE(uniform), a = smoothing."""
    if smoothing == 0.0:  # 0 * -inf would be NaN
        return ce
    return (1.0 - smoothing) * ce - smoothing * log_p.mean(-1)


def _mean(rows: Tensor) -> Tensor:
    """Mean over rows, 0 of none."""
    return rows.sum() / max(rows.shape[0], 1)


def _match(label: Tensor, truth: Tensor) -> Tensor:
    """Share of equal labels, float32."""
    return _mean((label == truth).float())


def _constant(value: Scalar, like: Tensor) -> float | Tensor:
    """A weight without gradient, in the type of the logits."""
    return value.detach().to(like) if isinstance(value, Tensor) else value


def _labels(pseudo: Pseudo, weak: Tensor, strong: Tensor) -> Tensor:
    """The pseudo labels (U,)."""
    if isinstance(pseudo, Tensor):
        return pseudo
    return (weak if pseudo == "weak" else strong.detach()).argmax(-1)


def _sample(p: Tensor, uniforms: Tensor) -> Tensor:
    """The first possible class whose cumulative p exceeds the number, or the last possible one."""
    classes = p.shape[-1]
    index = torch.arange(classes, device=p.device)
    steps = p.cumsum(-1)
    # A GPU adds up in a tree, whose sums may rise by a rounding at a class that adds nothing.
    above = (steps > uniforms[:, None] * steps[:, -1:]) & (p > 0)
    first = torch.where(above, index, classes).amin(-1)
    last = torch.where(p > 0, index, 0).amax(-1)
    return torch.where(first < classes, first, last)
