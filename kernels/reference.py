"""The losses in plain PyTorch: the definition that every kernel is tested against.

They run on any device and in any float type. 16-bit logits are lifted to float32 first; float64
stays float64, which makes it the oracle of the tests. Nothing here reads a tensor's value on the
host. Arguments are those that `mpl_fast.losses` has checked; a label out of range turns the loss
into NaN instead of an error, since finding it would need a synchronization.
"""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import (
    CEOut,
    Pseudo,
    PseudoLabels,
    Scalar,
    StudentOut,
    TeacherOut,
)


def pseudo_labels(
    weak: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    num_classes: int | None = None,
) -> PseudoLabels:
    """Each row's label, confidence and entropy under p = softmax(weak / temperature).

    weak: (U, W) logits. uniforms: (U,) numbers in [0, 1) draw the label from p; without them it is
    the arg-max. Nothing here carries a gradient.
    """
    weak = _lift(weak.detach(), num_classes)
    p, log_p, confidence = _sharpen(weak, temperature)
    if uniforms is None:
        label = weak.argmax(-1)
    else:
        steps = p.cumsum(-1)
        below = steps <= uniforms[:, None] * steps[:, -1:]
        label = below.sum(-1).clamp_max(p.shape[-1] - 1)
    return PseudoLabels(label, confidence.float(), (-_expected(p, log_p)).float())


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """Mean over all rows N of CE((1 - a) 1[target] + a / C, softmax(logits)), arXiv 1512.00567.

    logits: (N, W). target: (N,) int64; a row whose target is `ignore_index` adds 0 to the sum and
    still counts in N, so that the denominator is a constant. No rows give 0.
    """
    x = _lift(logits, num_classes)
    rows = _row_ce(x, target, label_smoothing, ignore_index)
    return CEOut(_mean(rows), _match(x.argmax(-1), target))


def student_loss(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
) -> StudentOut:
    """Mean over U of weight_i * CE_smoothed(pseudo_i, strong_i); labeled rows are only looked at.

    logits: (L + U, W), rows labeled | strong. pseudo: (U,) int64. target: (L,) int64, or None for
    L = 0. weight: (U,) or None for 1. The labeled CE is unsmoothed and has no gradient: it is the
    `old` of `mpl_feedback`. Source: Meta Pseudo Labels, arXiv 2003.10580.
    """
    x = _lift(logits, num_classes)
    strong = x[x.shape[0] - pseudo.shape[0] :]
    rows = _row_ce(strong, pseudo, label_smoothing)
    loss = _mean(rows if weight is None else rows * weight)
    if target is None:
        zero = loss.detach().float() * 0.0
        return StudentOut(loss, zero, zero)
    labeled = x[: target.shape[0]].detach()
    seen = _mean(_row_ce(labeled, target, 0.0)).float()
    return StudentOut(loss, seen, _match(labeled.argmax(-1), target))


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

    logits: (L + 2U, W). target: (L,) int64. n_unlabeled: U, may be 0. With q = softmax(weak /
    temperature) as a constant, each mean taken over all rows of its kind:

        sup = mean CE_smoothed(target, labeled)
        uda = mean 1[max q >= threshold] * CE(q, strong)       (UDA, arXiv 1904.12848)
        mpl = mean CE(y, strong)                               (MPL, arXiv 2003.10580)

    where y is the arg-max of weak, the arg-max of strong, or the tensor given as `pseudo`. Weak
    rows get no gradient. truth: (U,) int64, for the statistics alone.
    """
    x = _lift(logits, num_classes)
    weak = x[target.shape[0] : x.shape[0] - n_unlabeled].detach()
    strong = x[x.shape[0] - n_unlabeled :]
    q, log_q, confidence = _sharpen(weak, temperature)
    mask = (confidence >= threshold).to(x.dtype)
    if isinstance(pseudo, Tensor):
        label = pseudo
    else:
        label = (weak if pseudo == "weak" else strong.detach()).argmax(-1)
    sup = _mean(_row_ce(x[: target.shape[0]], target, label_smoothing, ignore_index))
    uda = _mean(mask * -_expected(q, strong.log_softmax(-1)))
    mpl = _mean(_row_ce(strong, label, 0.0))
    return TeacherOut(
        loss=sup + _constant(uda_weight, x) * uda + _constant(feedback, x) * mpl,
        sup=sup.detach().float(),
        uda=uda.detach().float(),
        mpl=mpl.detach().float(),
        mask_rate=_mean(mask).float(),
        confidence=_mean(confidence).float(),
        entropy=_mean(-_expected(q, log_q)).float(),
        pseudo_accuracy=_mean(mask * 0.0).float() if truth is None else _match(label, truth),
        label=label,
    )


def mpl_feedback(
    old: Tensor, new: Tensor, average: Tensor | None = None, *, momentum: float = 0.99
) -> Tensor:
    """How much the student's labeled loss fell, h = old - new, less its running mean if given.

    old, new, average: 0-dim. `average` moves in place by (1 - momentum) of the way to old - new and
    is then subtracted, in the official code's order (class MPL of its training_utils.py), so that
    the part of h that every step has, whatever the labels, is not credited to them. The sign is the
    paper's, not the official code's: h > 0 means that the pseudo labels helped.
    """
    h = old.detach().float() - new.detach().float()
    if average is None:
        return h
    average.lerp_(h.to(average.dtype), 1.0 - momentum)
    return h - average


def _lift(logits: Tensor, num_classes: int | None) -> Tensor:
    """(N, C), at least float32, without the padding columns."""
    return logits[:, :num_classes].to(torch.promote_types(logits.dtype, torch.float32))


def _sharpen(weak: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(weak / temperature), its logarithm, and its largest entry (exactly 1 / sum)."""
    # Subtract first: weak / temperature overflows where the temperature is tiny.
    distance = (weak - weak.amax(-1, keepdim=True)) / temperature
    log_p = distance.log_softmax(-1)
    return log_p.exp(), log_p, 1.0 / distance.exp().sum(-1)


def _expected(p: Tensor, value: Tensor) -> Tensor:
    """Sum of p * value along a row, where an impossible class adds 0 even if its value is -inf."""
    # p * 0 and not 0, so that a NaN in p survives.
    return torch.where(p > 0, p * value, p * 0.0).sum(-1)


def _row_ce(x: Tensor, target: Tensor, smoothing: float, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of each row (N,); 0 for an ignored one, NaN for a target out of range."""
    log_p = x.log_softmax(-1)
    ignored = target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= x.shape[-1]))
    at = torch.where(ignored | bad, 0, target)
    loss = -(1.0 - smoothing) * log_p.gather(-1, at[:, None])[:, 0]
    if smoothing > 0.0:  # 0 * -inf would be NaN
        loss = loss - smoothing * log_p.mean(-1)
    return torch.where(ignored, 0.0, torch.where(bad, torch.nan, loss))


def _mean(rows: Tensor) -> Tensor:
    """Mean over rows, 0 of none."""
    return rows.sum() / max(rows.shape[0], 1)


def _match(label: Tensor, truth: Tensor) -> Tensor:
    """Share of equal labels, float32."""
    return _mean((label == truth).float())


def _constant(value: Scalar, like: Tensor) -> float | Tensor:
    """A weight, without a gradient and in the type of the logits."""
    return value.detach().to(like) if isinstance(value, Tensor) else value
