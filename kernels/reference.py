"""The losses in plain PyTorch: the definition that every kernel is tested against.

They run on any device and in any float type. 16-bit logits are lifted to float32 first; float64
stays float64, which makes it the oracle of the tests. Nothing here reads a tensor's value on the
host. Arguments are those that `mpl_fast.losses` has checked and documents; a label out of range
turns the loss into NaN instead of an error, since finding it would need a synchronization.
"""

from mpl_fast.kernels.reference_rows import cosine_loss, exact_feedback, pseudo_labels, smoothed_ce
from mpl_fast.kernels.reference_student import mpl_feedback, student_loss, student_loss_and_grad
from mpl_fast.kernels.reference_teacher import teacher_loss, teacher_loss_and_grad

__all__ = [
    "cosine_loss",
    "exact_feedback",
    "mpl_feedback",
    "pseudo_labels",
    "smoothed_ce",
    "student_loss",
    "student_loss_and_grad",
    "teacher_loss",
    "teacher_loss_and_grad",
]
