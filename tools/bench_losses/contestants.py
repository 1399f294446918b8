"""Who computes a loss and its gradient: PyTorch eager and compiled, the fused kernels, Liger."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.kernels import reference
from mpl_fast.losses import Backend, StudentOut
from tools.bench_losses.problems import SMOOTHING, TEMPERATURE, THRESHOLD, Inputs, Shape


class Done(NamedTuple):
    """What a contestant returns; all of it has to be computed."""

    out: Any  # one of the tuples of `mpl_fast.losses`
    gradient: Tensor | None  # like the logits; pseudo labels have none


Call = Callable[[Inputs], Done]
EAGER, COMPILED, ONE_PASS, RECOMPUTE, LIGER = (
    "eager",
    "torch.compile",
    "ours one-pass",
    "ours recompute",
    "Liger",
)
OURS = (ONE_PASS, RECOMPUTE)


def names(shape: Shape) -> list[str]:
    """Who can take part. Liger knows hard labels without padding, and has to be installed."""
    found = [ONE_PASS, COMPILED, EAGER]
    if shape.loss != "pseudo":
        found.append(RECOMPUTE)
    if shape.loss == "student" and shape.width == shape.classes and find_spec("liger_kernel"):
        found.append(LIGER)
    return found


def build(name: str, shape: Shape) -> Call:
    """The contestant, which compiles when it is first called."""
    if name == LIGER:
        return _liger(shape)
    if name == ONE_PASS:
        return _one_pass(shape)
    if name == RECOMPUTE:
        return of_backend(_fused(), shape)
    return of_backend(reference, shape, compiled=name == COMPILED)


def of_backend(backend: Backend, shape: Shape, *, compiled: bool = False) -> Call:
    """The backend's plain function and, but for pseudo labels, autograd's gradient of its loss."""
    forward = _forward(backend, shape)
    if compiled:
        torch._dynamo.reset()  # or the ninth shape would silently run eagerly
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return _undifferentiated(forward) if shape.loss == "pseudo" else _differentiated(forward)


def _fused() -> Backend:
    from mpl_fast.kernels import fused  # needs triton: import late

    return fused


def _forward(backend: Backend, shape: Shape) -> Callable[[Inputs], Any]:
    """The loss as plain function; it closes over the numbers, so that they are compiled in."""
    classes, unlabeled = shape.classes, shape.batch
    if shape.loss == "teacher":
        return lambda x: backend.teacher_loss(
            x.logits,
            x.target,
            unlabeled,
            uda_weight=x.uda_weight,
            feedback=x.feedback,
            temperature=TEMPERATURE,
            threshold=THRESHOLD,
            label_smoothing=SMOOTHING,
            truth=x.truth,
            num_classes=classes,
        )
    if shape.loss == "student":
        return lambda x: backend.student_loss(
            x.logits, x.pseudo, x.target, label_smoothing=SMOOTHING, num_classes=classes
        )
    return lambda x: backend.pseudo_labels(
        x.logits.detach(), temperature=TEMPERATURE, num_classes=classes
    )


def _one_pass(shape: Shape) -> Call:
    backend, classes, unlabeled = _fused(), shape.classes, shape.batch

    def teacher(x: Inputs) -> Done:
        out, gradient = backend.teacher_loss_and_grad(
            x.logits,
            x.target,
            unlabeled,
            uda_weight=x.uda_weight,
            feedback=x.feedback,
            temperature=TEMPERATURE,
            threshold=THRESHOLD,
            label_smoothing=SMOOTHING,
            truth=x.truth,
            num_classes=classes,
        )
        return Done(out, gradient)

    def student(x: Inputs) -> Done:
        out, gradient = backend.student_loss_and_grad(
            x.logits, x.pseudo, x.target, label_smoothing=SMOOTHING, num_classes=classes
        )
        return Done(out, gradient)

    pseudo = _undifferentiated(_forward(backend, shape))
    return {"teacher": teacher, "student": student, "pseudo": pseudo}[shape.loss]


def _differentiated(forward: Callable[[Inputs], Any]) -> Call:
    def call(x: Inputs) -> Done:
        out = forward(x)
        (gradient,) = torch.autograd.grad(out.loss, x.logits)
        return Done(out, gradient)

    return call


def _undifferentiated(forward: Callable[[Inputs], Any]) -> Call:
    return lambda x: Done(forward(x), None)


def _liger(shape: Shape) -> Call:
    """Liger writes the gradient over the logits; the labeled rows' loss is PyTorch's."""
    loss_of = import_module("liger_kernel.transformers").LigerCrossEntropyLoss(
        label_smoothing=SMOOTHING
    )

    def call(x: Inputs) -> Done:
        labeled = x.logits[: shape.labeled].detach()
        strong = x.logits[shape.labeled :].detach().requires_grad_()
        old = F.cross_entropy(labeled.float(), x.target)
        hits = (labeled.argmax(-1) == x.target).float().mean()
        loss = loss_of(strong, x.pseudo)
        (gradient,) = torch.autograd.grad(loss, strong)
        return Done(StudentOut(loss, old, hits), gradient)

    return call
