"""The losses at one size: inputs, and the variants that compute loss and gradient of them.

Variants: the fused kernels in one pass and through autograd, our definition eager and compiled,
plain PyTorch as people write it (no guard against an impossible label), and Liger if installed.
All return the same tuples, statistics too, so that all do the same work.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels import reference
from mpl_fast.kernels.outputs import PseudoLabels, TeacherInputs, TeacherOut

UNLABELED_PER_LABELED = 8
# Nothing is left out: sharpened, masked, smoothed, with feedback.
TEMPERATURE, THRESHOLD, SMOOTHING = 0.7, 0.6, 0.1
LOSSES = ("teacher", "student", "pseudo", "feedback")  # all that a step of MPL computes
WITHOUT_GRADIENT = ("pseudo", "feedback")
PLAIN, EAGER = "eager, plain", "eager, definition"
COMPILED = "torch.compile"  # of our definition
ONE_PASS, AUTOGRAD, LIGER = "ours one-pass", "ours autograd", "Liger"
OURS = (ONE_PASS, AUTOGRAD)


class Shape(NamedTuple):
    """A loss at one size."""

    loss: str  # one of LOSSES
    classes: int
    batch: int  # unlabeled images
    dtype: torch.dtype

    @property
    def labeled(self) -> int:
        """Labeled images."""
        return self.batch // UNLABELED_PER_LABELED

    @property
    def rows(self) -> int:
        """labeled | weak | strong of the teacher; strong; weak; labeled, before and after."""
        views = {"teacher": 2 * self.batch + self.labeled, "feedback": 2 * self.labeled}
        return views.get(self.loss, self.batch)

    @property
    def logit_bytes(self) -> int:
        """Size of the logits."""
        return self.rows * self.classes * self.dtype.itemsize

    @property
    def minimal_bytes(self) -> int:
        """Each logit read once and, where there is one, its gradient written once."""
        return self.logit_bytes * (1 if self.loss in WITHOUT_GRADIENT else 2)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.loss} C={self.classes} B={self.batch} {dtype}"


class Inputs(NamedTuple):
    """One set of arguments, all on one device."""

    logits: Tensor  # (rows, C), requires a gradient
    target: Tensor  # (L,) int64
    pseudo: Tensor  # (U,) int64, the student's labels
    truth: Tensor  # (U,) int64
    uda_weight: Tensor  # 0-dim float32
    feedback: Tensor  # 0-dim float32


class Outputs(NamedTuple):
    """What a variant returns; all of it has to be computed."""

    out: tuple[Tensor, ...]  # first the loss, where it has a gradient
    gradient: Tensor | None  # like the logits


Forward = Callable[[Inputs], tuple[Tensor, ...]]
Call = Callable[[Inputs], Outputs]


def draw(shape: Shape, device: str) -> Inputs:
    """Random logits of a network that is confident of some rows; labels of any class.

    A confident row has a class that is far ahead, so that hardly a confidence is near the
    threshold, where rounding would decide.
    """

    def labels(count: int) -> Tensor:
        return torch.randint(shape.classes, (count,), device=device)

    logits, confident = torch.randn(shape.rows, shape.classes, device=device), shape.rows // 2
    logits[torch.arange(confident, device=device), labels(confident)] += 10.0
    return Inputs(
        logits.to(shape.dtype).requires_grad_(),
        labels(shape.labeled),
        labels(shape.batch),
        labels(shape.batch),
        *(0.5 + torch.rand(2, device=device)).unbind(),
    )


def names(loss: str) -> list[str]:
    """The variants of this loss."""
    found = [ONE_PASS, COMPILED, PLAIN, EAGER]
    if loss == "student":
        found += [AUTOGRAD, *([LIGER] if find_spec("liger_kernel") else [])]
    return found


def build(name: str, loss: str) -> Call:
    """The variant, which compiles when it is first called."""
    if name == ONE_PASS:
        return _ONE_PASS[loss]
    forward = _forward(name, loss)
    if loss in WITHOUT_GRADIENT:
        return lambda x: Outputs(forward(x), None)

    def differentiated(x: Inputs) -> Outputs:
        out = forward(x)
        return Outputs(out, torch.autograd.grad(out[0], x.logits)[0])

    return differentiated


def _forward(name: str, loss: str) -> Forward:
    if name == PLAIN:
        return _PLAIN[loss]
    if name == COMPILED:
        return torch.compile(_DEFINED[loss], fullgraph=True, dynamic=False)
    if name == AUTOGRAD:
        return lambda x: (losses.student_loss(x.logits, x.pseudo, label_smoothing=SMOOTHING),)
    if name == LIGER:
        module: Any = import_module("liger_kernel.transformers")
        loss_of = module.LigerCrossEntropyLoss(label_smoothing=SMOOTHING)
        return lambda x: (loss_of(x.logits, x.pseudo),)
    return _DEFINED[loss]


def _teacher_arguments(x: Inputs) -> dict[str, Any]:
    return {
        "target": x.target,
        "n_unlabeled": x.truth.shape[0],
        "uda_weight": x.uda_weight,
        "feedback": x.feedback,
        "temperature": TEMPERATURE,
        "threshold": THRESHOLD,
        "label_smoothing": SMOOTHING,
        "pseudo": "weak",
        "truth": x.truth,
    }


# --- our kernels, called as a step calls them ---


def _one_pass_student(x: Inputs) -> Outputs:
    loss, grad = losses.student_loss_and_grad(x.logits, x.pseudo, label_smoothing=SMOOTHING)
    return Outputs((loss,), grad)


def _one_pass_feedback(x: Inputs) -> Outputs:
    before, after = x.logits.detach().split(x.target.shape[0])
    old, new = (losses.smoothed_ce(logits, x.target).loss for logits in (before, after))
    return Outputs((old, new, losses.mpl_feedback(old, new)), None)


_ONE_PASS: dict[str, Call] = {
    "teacher": lambda x: Outputs(*losses.teacher_loss_and_grad(x.logits, **_teacher_arguments(x))),
    "student": _one_pass_student,
    "pseudo": lambda x: Outputs(losses.pseudo_labels(x.logits.detach()), None),
    "feedback": _one_pass_feedback,
}

# --- our definition; of float64 logits it is what all variants are compared with ---


def _defined_feedback(x: Inputs) -> tuple[Tensor, ...]:
    before, after = x.logits.detach().split(x.target.shape[0])
    old, new = (reference.smoothed_ce(logits, x.target, 0.0).loss for logits in (before, after))
    return old, new, losses.mpl_feedback(old, new)


_DEFINED: dict[str, Forward] = {
    "teacher": lambda x: reference.teacher_loss(
        TeacherInputs(logits=x.logits, **_teacher_arguments(x))
    ),
    "student": lambda x: (reference.student_loss(x.logits, x.pseudo, SMOOTHING, None),),
    "pseudo": lambda x: reference.pseudo_labels(x.logits.detach(), None),
    "feedback": _defined_feedback,
}

# --- plain PyTorch ---


def _plain_teacher(x: Inputs) -> TeacherOut:
    unlabeled = x.truth.shape[0]
    counts = [x.target.shape[0], unlabeled, unlabeled]
    labeled, weak, strong = x.logits.float().split(counts)
    q, confidence, entropy = _sharpened(weak.detach(), TEMPERATURE)
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
        pseudo_accuracy=(label == x.truth).float().mean(),
        label=label,
    )


def _plain_student(x: Inputs) -> tuple[Tensor, ...]:
    return (F.cross_entropy(x.logits.float(), x.pseudo, label_smoothing=SMOOTHING),)


def _plain_pseudo(x: Inputs) -> PseudoLabels:
    weak = x.logits.detach().float()
    _, confidence, entropy = _sharpened(weak, 1.0)
    return PseudoLabels(weak.argmax(-1), confidence, entropy)


def _plain_feedback(x: Inputs) -> tuple[Tensor, ...]:
    old, new = x.logits.detach().float().split(x.target.shape[0])
    before, after = F.cross_entropy(old, x.target), F.cross_entropy(new, x.target)
    return before, after, before - after


def _sharpened(weak: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, the largest of each row, and each row's entropy."""
    q = torch.softmax(weak / temperature, -1)
    return q, q.amax(-1), -(q * q.clamp_min(1e-30).log()).sum(-1)


_PLAIN: dict[str, Forward] = {
    "teacher": _plain_teacher,
    "student": _plain_student,
    "pseudo": _plain_pseudo,
    "feedback": _plain_feedback,
}
