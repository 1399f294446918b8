"""The losses as people write them: no guard against an impossible label, no care for launches.

The logits are lifted to float32 first, as autocast does for these functions. They return all that
the others return, statistics too, so that everybody does the same work.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.losses import PseudoLabels, StudentOut, TeacherOut
from tools.bench_losses.problems import (
    SMOOTHING,
    TEMPERATURE,
    THRESHOLD,
    FeedbackOut,
    Inputs,
    Shape,
)


def forward(shape: Shape) -> Callable[[Inputs], Any]:
    """The loss, as a function of its inputs."""
    functions = {"teacher": _teacher, "student": _student, "pseudo": _pseudo, "feedback": _feedback}
    function = functions[shape.loss]
    return lambda x: function(x, shape)


def _teacher(x: Inputs, shape: Shape) -> TeacherOut:
    counts = [shape.labeled, shape.batch, shape.batch]
    labeled, weak, strong = x.logits[:, : shape.classes].float().split(counts)
    q, confidence, entropy = _sharpened(weak.detach())
    mask = (confidence >= THRESHOLD).float()
    label = weak.detach().argmax(-1)
    sup = F.cross_entropy(labeled, x.target, label_smoothing=SMOOTHING)
    uda = (-(q * F.log_softmax(strong, -1)).sum(-1) * mask).mean()
    mpl = F.cross_entropy(strong, label)
    return TeacherOut(
        loss=sup + x.uda_weight * uda + x.feedback * mpl,
        sup=sup,
        uda=uda,
        mpl=mpl,
        mask_rate=mask.mean(),
        confidence=confidence.mean(),
        entropy=entropy.mean(),
        pseudo_accuracy=_share(label, x.truth),
        label=label,
    )


def _student(x: Inputs, shape: Shape) -> StudentOut:
    labeled, strong = x.logits[:, : shape.classes].float().split([shape.labeled, shape.batch])
    labeled = labeled.detach()
    loss = F.cross_entropy(strong, x.pseudo, label_smoothing=SMOOTHING)
    old = F.cross_entropy(labeled, x.target)
    return StudentOut(loss, old, _share(labeled.argmax(-1), x.target))


def _pseudo(x: Inputs, shape: Shape) -> PseudoLabels:
    weak = x.logits.detach()[:, : shape.classes].float()
    _, confidence, entropy = _sharpened(weak)
    return PseudoLabels(weak.argmax(-1), confidence, entropy)


def _feedback(x: Inputs, shape: Shape) -> FeedbackOut:
    old, new = x.logits.detach()[:, : shape.classes].float().split(shape.labeled)
    before, after = F.cross_entropy(old, x.target), F.cross_entropy(new, x.target)
    return FeedbackOut(before, after, before - after)


def _sharpened(weak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, the largest of each row, and each row's entropy."""
    q = torch.softmax(weak / TEMPERATURE, -1)
    return q, q.amax(-1), -(q * q.clamp_min(1e-30).log()).sum(-1)


def _share(label: Tensor, truth: Tensor) -> Tensor:
    return (label == truth).float().mean()
