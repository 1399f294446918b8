"""The losses with Triton kernels, under the names of `reference`: one file a loss."""

from mpl_fast.kernels.batch_norm import batch_norm_jvp
from mpl_fast.kernels.cosine import cosine_loss
from mpl_fast.kernels.exact import exact_feedback
from mpl_fast.kernels.pseudo import pseudo_labels
from mpl_fast.kernels.student import smoothed_ce, student_loss, student_loss_and_grad
from mpl_fast.kernels.teacher import teacher_loss_and_grad

__all__ = [
    "batch_norm_jvp",
    "cosine_loss",
    "exact_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "student_loss_and_grad",
    "teacher_loss_and_grad",
]
