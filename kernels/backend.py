"""What an implementation of the losses offers: the modules `reference` and `fused` satisfy it."""

from typing import Protocol

from torch import Tensor

from mpl_fast.kernels.outputs import (
    CEOut,
    CosineOut,
    Pseudo,
    PseudoLabels,
    Scalar,
    StudentOut,
    TeacherOut,
)


class Backend(Protocol):
    """The losses after `mpl_fast.losses` has checked their arguments; it documents them."""

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
        temperature: float = ...,
        weight: Tensor | None = ...,
        num_classes: int | None = ...,
    ) -> StudentOut: ...

    def student_loss_and_grad(
        self,
        logits: Tensor,
        pseudo: Tensor,
        target: Tensor | None = ...,
        *,
        label_smoothing: float = ...,
        temperature: float = ...,
        weight: Tensor | None = ...,
        num_classes: int | None = ...,
        grad_scale: Tensor | None = ...,
    ) -> tuple[StudentOut, Tensor]: ...

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

    def teacher_loss_and_grad(
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
        grad_scale: Tensor | None = ...,
    ) -> tuple[TeacherOut, Tensor]: ...

    def cosine_loss(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        temperature: float = ...,
        threshold: float = ...,
        num_classes: int | None = ...,
    ) -> CosineOut: ...

    def exact_feedback(
        self,
        logits: Tensor,
        direction: Tensor,
        *,
        weight: Scalar,
        temperature: float = ...,
        num_classes: int | None = ...,
    ) -> Tensor: ...
