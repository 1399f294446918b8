"""Who computes a loss and its gradient: PyTorch eager and compiled, the fused kernels, others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpl_fast.kernels import reference
from mpl_fast.losses import Backend
from tools.bench_losses import others, plain
from tools.bench_losses.problems import (
    SMOOTHING,
    TEMPERATURE,
    THRESHOLD,
    WITHOUT_GRADIENT,
    FeedbackOut,
    Inputs,
    Shape,
)


class Done(NamedTuple):
    """What a contestant returns; all of it has to be computed."""

    out: Any  # a tuple of `mpl_fast.losses`, or FeedbackOut
    gradient: Tensor | None  # like the logits, or like the last of them: those that have one


Call = Callable[[Inputs], Done]
PLAIN, EAGER = "eager, plain", "eager, definition"
COMPILED, AUTOTUNED = "torch.compile", "torch.compile max-autotune"
ONE_PASS, RECOMPUTE = "ours one-pass", "ours recompute"
LIGER, APEX = "Liger", "apex"
OURS = (ONE_PASS, RECOMPUTE)
MODES = {COMPILED: None, AUTOTUNED: "max-autotune-no-cudagraphs"}  # both of our definition
SYNCHRONIZING = (LIGER,)  # no graph can hold it, and trying spoils what follows
ROUGH = (LIGER, APEX)  # they may round their losses to the logits' type


def names(shape: Shape) -> list[str]:
    """Who can take part, in the order of preparation; the others know no padding.

    Liger is the last: it writes over its inputs and synchronizes.
    """
    found = [ONE_PASS, COMPILED, PLAIN, EAGER]
    if shape.loss not in WITHOUT_GRADIENT:
        found.append(RECOMPUTE)
    found.append(AUTOTUNED)
    if shape.loss == "student" and shape.width == shape.classes:
        found += [APEX] if others.apex_cross_entropy() else []
        found += [LIGER] if others.has_liger() else []
    return found


def build(name: str, shape: Shape) -> Call:
    """The contestant, which compiles when it is first called."""
    if name in (LIGER, APEX):
        lesson = (others.liger if name == LIGER else others.apex)(shape)
        return lambda x: Done(*lesson(x))
    if name == ONE_PASS:
        return _one_pass(shape)
    forward = _forward(_fused() if name == RECOMPUTE else reference, shape)
    if name == PLAIN:
        forward = plain.forward(shape)
    if name in MODES:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, mode=MODES[name])
    return _finished(forward, shape)


def definition(shape: Shape) -> Call:
    """Our definition of the loss: in float64, it says who is right."""
    return _finished(_forward(reference, shape), shape)


def clear() -> None:
    """Drops what torch.compile has made, or the ninth shape would silently run eagerly."""
    torch._dynamo.reset()


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
    if shape.loss == "feedback":
        return lambda x: _feedback(backend, x, classes)
    return lambda x: backend.pseudo_labels(
        x.logits.detach(), temperature=TEMPERATURE, num_classes=classes
    )


def _feedback(backend: Backend, x: Inputs, classes: int) -> FeedbackOut:
    """As a step does it: the labeled loss before and after the student's update."""
    labeled = x.target.shape[0]
    old = backend.smoothed_ce(x.logits[:labeled].detach(), x.target, num_classes=classes).loss
    new = backend.smoothed_ce(x.logits[labeled:].detach(), x.target, num_classes=classes).loss
    return FeedbackOut(old, new, reference.mpl_feedback(old, new))


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

    if shape.loss in WITHOUT_GRADIENT:
        return _finished(_forward(backend, shape), shape)
    return {"teacher": teacher, "student": student}[shape.loss]


def _finished(forward: Callable[[Inputs], Any], shape: Shape) -> Call:
    """With autograd's gradient of the loss, where it has one."""

    def differentiated(x: Inputs) -> Done:
        out = forward(x)
        (gradient,) = torch.autograd.grad(out.loss, x.logits)
        return Done(out, gradient)

    if shape.loss in WITHOUT_GRADIENT:
        return lambda x: Done(forward(x), None)
    return differentiated
