"""What the definitions of the losses are made of: lifted logits, sharpened rows, cross-entropies.

x: (N, C) logits that `lift` returned. p, q: (N, C) distributions.
"""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import Scalar


def lift(logits: Tensor, num_classes: int | None) -> Tensor:
    """(N, C), at least float32, without the padding columns."""
    return logits[:, :num_classes].to(torch.promote_types(logits.dtype, torch.float32))


def sharpen(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(x / temperature), its logarithm, and its largest entry (exactly 1 / sum)."""
    distance = sharpened(x, temperature)
    log_p = distance.log_softmax(-1)
    return log_p.exp(), log_p, 1.0 / distance.exp().sum(-1)


def sharpened(x: Tensor, temperature: float) -> Tensor:
    """x / temperature up to a constant of the row, so that its largest entry is 0."""
    # Subtract first: x / temperature overflows where the temperature is tiny.
    return (x - x.detach().amax(-1, keepdim=True)) / temperature


def expected(p: Tensor, value: Tensor) -> Tensor:
    """Sum of p * value along a row, where an impossible class adds 0 even if its value is -inf."""
    # p * 0 and not 0, so that a NaN in p survives.
    return torch.where(p > 0, p * value, p * 0.0).sum(-1)


def label_ce(x: Tensor, label: Tensor, smoothing: float, ignore_index: int | None = None) -> Tensor:
    """CE of each row (N,) with classes (N,); 0 for an ignored one, NaN for one out of range."""
    log_p = x.log_softmax(-1)
    ignored = torch.zeros_like(label, dtype=torch.bool)
    if ignore_index is not None:
        ignored = label == ignore_index
    bad = ~ignored & outside(label, x)
    at = torch.where(ignored | bad, 0, label)
    loss = smoothed(-log_p.gather(-1, at[:, None])[:, 0], log_p, smoothing)
    # Times NaN and not instead of it: the gradient has to show it, too.
    return torch.where(ignored, 0.0, loss * torch.where(bad, torch.nan, 1.0))


def soft_ce(x: Tensor, q: Tensor, smoothing: float) -> Tensor:
    """CE of each row (N,) with distributions q."""
    log_p = x.log_softmax(-1)
    return smoothed(-expected(q, log_p), log_p, smoothing)


def smoothed(ce: Tensor, log_p: Tensor, smoothing: float) -> Tensor:
    """(1 - a) CE(target) + a CE(uniform), a = smoothing."""
    if smoothing == 0.0:  # 0 * -inf would be NaN
        return ce
    return (1.0 - smoothing) * ce - smoothing * log_p.mean(-1)


def outside(label: Tensor, x: Tensor) -> Tensor:
    """Which labels (N,) are no class of x."""
    return (label < 0) | (label >= x.shape[-1])


def mean(rows: Tensor) -> Tensor:
    """Mean over rows, 0 of none."""
    return rows.sum() / max(rows.shape[0], 1)


def match(label: Tensor, truth: Tensor) -> Tensor:
    """Share of equal labels, float32."""
    return mean((label == truth).float())


def constant(value: Scalar, like: Tensor) -> float | Tensor:
    """A weight, without a gradient and in the type of the logits."""
    return value.detach().to(like) if isinstance(value, Tensor) else value


def scaled(loss: Tensor, scale: Tensor | None) -> Tensor:
    """What to differentiate: with the scale on top, where nothing is rounded to 16 bits yet."""
    return loss if scale is None else loss * scale.detach().to(loss)
