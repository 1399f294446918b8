"""The losses with Triton, one module of the backend: see `losses` for what each one computes."""

from mpl_fast.kernels.fused_rows import cosine_loss, exact_feedback, pseudo_labels
from mpl_fast.kernels.fused_student import student_loss, student_loss_and_grad
from mpl_fast.kernels.fused_teacher import smoothed_ce, teacher_loss, teacher_loss_and_grad

__all__ = [
    "cosine_loss",
    "exact_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "student_loss_and_grad",
    "teacher_loss",
    "teacher_loss_and_grad",
]
