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


class StudentOut(NamedTuple):
    """The student's loss alone."""

    loss: Tensor


class FeedbackOut(NamedTuple):
    """Labeled losses of the student before and after its update, and their difference."""

    old: Tensor
    new: Tensor
    h: Tensor


class Outputs(NamedTuple):
    """What a variant returns; all of it has to be computed."""

    out: Any  # TeacherOut, StudentOut, PseudoLabels or FeedbackOut
    gradient: Tensor | None  # like the logits


Call = Callable[[Inputs], Outputs]


def draw(shape: Shape, device: str, generator: torch.Generator | None = None) -> Inputs:
    """Random logits of a network that is confident of some rows; labels of any class."""

    def labels(count: int) -> Tensor:
        return torch.randint(shape.classes, (count,), device=device, generator=generator)

    logits = torch.randn(shape.rows, shape.classes, device=device, generator=generator)
    logits[: shape.rows // 2] *= 4.0
    scalars = torch.rand(2, device=device, generator=generator) + 0.5
    return Inputs(
        logits.to(shape.dtype).requires_grad_(),
        labels(shape.labeled),
        labels(shape.batch),
        labels(shape.batch),
        scalars[0].clone(),
        scalars[1].clone(),
    )


def names(shape: Shape) -> list[str]:
    """The variants of this loss. Liger is the last: it overwrites its inputs and synchronizes."""
    found = [ONE_PASS, COMPILED, PLAIN, EAGER]
    if shape.loss == "student":
        found += [AUTOGRAD, *([LIGER] if find_spec("liger_kernel") else [])]
    return found


def build(name: str, shape: Shape) -> Call:
    """The variant, which compiles when it is first called."""
    if name == LIGER:
        module = import_module("liger_kernel.transformers")
        loss_of = module.LigerCrossEntropyLoss(label_smoothing=SMOOTHING)
        return _differentiated(lambda x: StudentOut(loss_of(x.logits, x.pseudo)), shape)
    if name in OURS:
        return _fused(name, shape)
    if name == PLAIN:
        return _differentiated(_PLAIN[shape.loss], shape)
    if name == COMPILED:
        forward = torch.compile(_defined(shape), fullgraph=True, dynamic=False)
        return _differentiated(forward, shape)
    return _differentiated(_defined(shape), shape)


def definition(shape: Shape) -> Call:
    """Our definition of the loss; of float64 logits it is the reference for all variants."""
    return build(EAGER, shape)


def _defined(shape: Shape) -> Callable[[Inputs], Any]:
    """The plain PyTorch definition, as a function of tensors."""
    found: dict[str, Callable[[Inputs], Any]] = {
        "teacher": lambda x: reference.teacher_loss(_teacher_inputs(x)),
        "student": lambda x: StudentOut(
            reference.student_loss(x.logits, x.pseudo, SMOOTHING, None)
        ),
        "pseudo": lambda x: reference.pseudo_labels(x.logits.detach(), None),
        "feedback": _feedback_defined,
    }
    return found[shape.loss]


def _fused(name: str, shape: Shape) -> Call:
    """Our kernels, called as a step calls them."""

    def student(x: Inputs) -> Outputs:
        labels, smoothing = x.pseudo, SMOOTHING
        if name == AUTOGRAD:
            loss = losses.student_loss(x.logits, labels, label_smoothing=smoothing)
            return Outputs(StudentOut(loss.detach()), torch.autograd.grad(loss, x.logits)[0])
        loss, grad = losses.student_loss_and_grad(x.logits, labels, label_smoothing=smoothing)
        return Outputs(StudentOut(loss), grad)

    calls: dict[str, Call] = {
        "teacher": lambda x: Outputs(
            *losses.teacher_loss_and_grad(x.logits, **_teacher_arguments(x))
        ),
        "student": student,
        "pseudo": lambda x: Outputs(losses.pseudo_labels(x.logits.detach()), None),
        "feedback": lambda x: Outputs(_feedback(x), None),
    }

    def call(x: Inputs) -> Outputs:
        with losses.use("triton"):
            return calls[shape.loss](x)

    return call


def _feedback(x: Inputs) -> FeedbackOut:
    labeled = x.target.shape[0]
    old = losses.smoothed_ce(x.logits[:labeled].detach(), x.target).loss
    new = losses.smoothed_ce(x.logits[labeled:].detach(), x.target).loss
    return FeedbackOut(old, new, losses.mpl_feedback(old, new))


def _feedback_defined(x: Inputs) -> FeedbackOut:
    with losses.use("reference"):
        return _feedback(x)


def _differentiated(forward: Callable[[Inputs], Any], shape: Shape) -> Call:
    """With autograd's gradient of the loss, where it has one."""

    def call(x: Inputs) -> Outputs:
        out = forward(x)
        return Outputs(out, torch.autograd.grad(out.loss, x.logits)[0])

    if shape.loss in WITHOUT_GRADIENT:
        return lambda x: Outputs(forward(x), None)
    return call


def _teacher_arguments(x: Inputs) -> dict[str, Any]:
    return {
        "target": x.target,
        "n_unlabeled": x.truth.shape[0],
        "uda_weight": x.uda_weight,
        "feedback": x.feedback,
        "temperature": TEMPERATURE,
        "threshold": THRESHOLD,
        "label_smoothing": SMOOTHING,
        "truth": x.truth,
    }


def _teacher_inputs(x: Inputs) -> TeacherInputs:
    return TeacherInputs(logits=x.logits, pseudo="weak", **_teacher_arguments(x))


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


def _plain_student(x: Inputs) -> StudentOut:
    return StudentOut(F.cross_entropy(x.logits.float(), x.pseudo, label_smoothing=SMOOTHING))


def _plain_pseudo(x: Inputs) -> PseudoLabels:
    weak = x.logits.detach().float()
    _, confidence, entropy = _sharpened(weak, 1.0)
    return PseudoLabels(weak.argmax(-1), confidence, entropy)


def _plain_feedback(x: Inputs) -> FeedbackOut:
    old, new = x.logits.detach().float().split(x.target.shape[0])
    before, after = F.cross_entropy(old, x.target), F.cross_entropy(new, x.target)
    return FeedbackOut(before, after, before - after)


def _sharpened(weak: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, the largest of each row, and each row's entropy."""
    q = torch.softmax(weak / temperature, -1)
    return q, q.amax(-1), -(q * q.clamp_min(1e-30).log()).sum(-1)


_PLAIN: dict[str, Callable[[Inputs], Any]] = {
    "teacher": _plain_teacher,
    "student": _plain_student,
    "pseudo": _plain_pseudo,
    "feedback": _plain_feedback,
}
