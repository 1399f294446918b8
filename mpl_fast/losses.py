"""The losses of all algorithms, and the one place that decides who computes them.

On a GPU with Triton installed they are fused kernels, everywhere else plain PyTorch
(`kernels/reference.py`, which defines them). Both modules satisfy `Backend`, so mypy fails where
their signatures drift apart. The environment variable ``MPL_FAST_LOSSES=reference`` keeps plain
PyTorch on a GPU too: for comparison, or on a machine without the C compiler that Triton needs.

All tensors lie on one device; no function synchronizes it. Of what they return only ``loss``
carries a gradient. They raise ValueError or TypeError for a shape, type or number that cannot be
right; label *values* out of range are not looked for and give NaN.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from mpl_fast.kernels import checks, reference
from mpl_fast.kernels.outputs import (
    CEOut,
    Pseudo,
    PseudoLabels,
    Scalar,
    StudentOut,
    TeacherOut,
)

__all__ = [
    "CEOut",
    "PseudoLabels",
    "StudentOut",
    "TeacherOut",
    "backend",
    "mpl_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "teacher_loss",
    "use",
]

Choice = Literal["auto", "triton", "reference"]
VARIABLE = "MPL_FAST_LOSSES"


class Backend(Protocol):
    """What an implementation of the losses offers; modules satisfy it."""

    def pseudo_labels(
        self,
        weak: Tensor,
        *,
        temperature: float = ...,
        uniforms: Tensor | None = ...,
        num_classes: int | None = ...,
    ) -> PseudoLabels: ...

    def smoothed_ce(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        label_smoothing: float = ...,
        ignore_index: int = ...,
        num_classes: int | None = ...,
    ) -> CEOut: ...

    def student_loss(
        self,
        logits: Tensor,
        pseudo: Tensor,
        target: Tensor | None = ...,
        *,
        label_smoothing: float = ...,
        weight: Tensor | None = ...,
        num_classes: int | None = ...,
    ) -> StudentOut: ...

    def teacher_loss(
        self,
        logits: Tensor,
        target: Tensor,
        n_unlabeled: int,
        *,
        uda_weight: Scalar,
        feedback: Scalar,
        temperature: float = ...,
        threshold: float = ...,
        label_smoothing: float = ...,
        pseudo: Pseudo = ...,
        truth: Tensor | None = ...,
        ignore_index: int = ...,
        num_classes: int | None = ...,
    ) -> TeacherOut: ...


def _choice_of_environment() -> Choice:
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Choice):
        raise ConfigError(f"{VARIABLE} is {value!r}; it may be {', '.join(get_args(Choice))}")
    return cast(Choice, value)


_choice: Choice = _choice_of_environment()
_has_triton = find_spec("triton") is not None


def backend(logits: Tensor) -> Backend:
    """The implementation that serves these logits. Triton's kernels know no float64."""
    fits = logits.is_cuda and _has_triton and logits.dtype != torch.float64
    if _choice == "triton" or (_choice == "auto" and fits):
        from mpl_fast.kernels import fused  # needs triton: import late

        return fused
    return reference


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Forces a backend, for tests and benchmarks."""
    global _choice
    previous, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = previous


mpl_feedback = reference.mpl_feedback


def pseudo_labels(
    weak: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    num_classes: int | None = None,
) -> PseudoLabels:
    """Labels (U,), confidences and entropies of logits (U, W): see `reference.pseudo_labels`."""
    classes = checks.logits(weak, num_classes)
    checks.temperature(temperature)
    if uniforms is not None and uniforms.shape != weak.shape[:1]:
        raise ValueError(f"uniforms must have shape ({len(weak)},), not {tuple(uniforms.shape)}")
    return backend(weak).pseudo_labels(
        weak, temperature=temperature, uniforms=uniforms, num_classes=classes
    )


def smoothed_ce(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> CEOut:
    """Label-smoothed cross-entropy of logits (N, W) with target (N,): `reference.smoothed_ce`."""
    classes = checks.logits(logits, num_classes)
    checks.labels("target", target, len(logits))
    checks.smoothing(label_smoothing)
    return backend(logits).smoothed_ce(
        logits,
        target,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        num_classes=classes,
    )


def student_loss(
    logits: Tensor,
    pseudo: Tensor,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    num_classes: int | None = None,
) -> StudentOut:
    """Loss on pseudo labels (U,) of rows labeled | strong (L + U, W): `reference.student_loss`."""
    classes = checks.logits(logits, num_classes)
    unlabeled = len(logits) - (0 if target is None else len(target))
    checks.labels("pseudo", pseudo, unlabeled)
    if target is not None:
        checks.labels("target", target, len(logits) - unlabeled)
    checks.smoothing(label_smoothing)
    if weight is not None and weight.shape != pseudo.shape:
        raise ValueError(f"weight must have shape ({unlabeled},), not {tuple(weight.shape)}")
    return backend(logits).student_loss(
        logits,
        pseudo,
        target,
        label_smoothing=label_smoothing,
        weight=weight,
        num_classes=classes,
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
    """sup + uda_weight * uda + feedback * mpl of rows labeled | weak | strong (L + 2U, W).

    `reference.teacher_loss` has the formula and every argument.
    """
    classes = checks.logits(logits, num_classes)
    checks.split(len(logits), len(target), n_unlabeled)
    checks.labels("target", target, len(target))
    checks.temperature(temperature)
    checks.smoothing(label_smoothing)
    checks.scalar("uda_weight", uda_weight)
    checks.scalar("feedback", feedback)
    if isinstance(pseudo, Tensor):
        checks.labels("pseudo", pseudo, n_unlabeled)
    elif pseudo not in ("weak", "strong"):
        raise ValueError(f"pseudo must be 'weak', 'strong' or a tensor of labels, not {pseudo!r}")
    if truth is not None:
        checks.labels("truth", truth, n_unlabeled)
    return backend(logits).teacher_loss(
        logits,
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
        num_classes=classes,
    )
