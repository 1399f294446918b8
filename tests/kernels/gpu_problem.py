"""Arguments of all losses on a GPU, and all that can be computed of them at once."""

import torch
from torch import Tensor

from mpl_fast import losses

DEVICE = "cuda"
LABELED, UNLABELED = 6, 40


class Problem:
    """Arguments on the GPU; scalars and labels are tensors, so that a graph sees them change."""

    def __init__(self, classes: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def labels(count: int) -> Tensor:
            return torch.randint(classes, (count,), device=DEVICE, generator=generator)

        rows = LABELED + 2 * UNLABELED
        logits = torch.randn(rows, width, device=DEVICE, generator=generator) * 3.0
        self.logits = logits.to(dtype).requires_grad_()
        self.target, self.truth = labels(LABELED), labels(UNLABELED)
        self.pseudo = labels(UNLABELED)
        self.uda_weight, self.feedback = torch.rand(2, device=DEVICE, generator=generator).unbind()
        self.weight = torch.rand(UNLABELED, device=DEVICE, generator=generator)
        self.classes = classes

    def lifted(self) -> "Problem":
        """The same in float64."""
        other = Problem.__new__(Problem)
        vars(other).update(vars(self))
        other.logits = self.logits.detach().double().requires_grad_()
        return other

    def copy_from(self, other: "Problem") -> None:
        """New numbers in the same memory, as the next step of a captured graph finds them."""
        for name, mine in vars(self).items():
            if isinstance(mine, Tensor):
                mine.detach().copy_(getattr(other, name).detach())

    def teacher(self) -> losses.TeacherOut:
        return losses.teacher_loss(
            self.logits,
            self.target,
            UNLABELED,
            uda_weight=self.uda_weight,
            feedback=self.feedback,
            temperature=0.7,
            threshold=0.3,
            label_smoothing=0.1,
            pseudo=self.pseudo,
            truth=self.truth,
            num_classes=self.classes,
        )

    def teacher_and_grad(self, scale: Tensor | None = None) -> tuple[losses.TeacherOut, Tensor]:
        return losses.teacher_loss_and_grad(
            self.logits,
            self.target,
            UNLABELED,
            uda_weight=self.uda_weight,
            feedback=self.feedback,
            temperature=0.7,
            threshold=0.3,
            label_smoothing=0.1,
            pseudo=self.pseudo,
            truth=self.truth,
            num_classes=self.classes,
            grad_scale=scale,
        )

    def student(self) -> losses.StudentOut:
        return losses.student_loss(
            self.logits[: LABELED + UNLABELED],
            self.pseudo,
            self.target,
            label_smoothing=0.1,
            weight=self.weight,
            num_classes=self.classes,
        )

    def student_and_grad(self) -> tuple[losses.StudentOut, Tensor]:
        return losses.student_loss_and_grad(
            self.logits[: LABELED + UNLABELED].detach(),
            self.pseudo,
            self.target,
            label_smoothing=0.1,
            weight=self.weight,
            num_classes=self.classes,
        )

    def weak(self) -> losses.PseudoLabels:
        weak = self.logits[LABELED : LABELED + UNLABELED].detach()
        return losses.pseudo_labels(weak, temperature=0.7, num_classes=self.classes)

    def cosine(self) -> losses.CosineOut:
        strong = self.logits[LABELED + UNLABELED :]
        return losses.cosine_loss(strong, self.pseudo, num_classes=self.classes)

    def exact(self) -> Tensor:
        direction = torch.ones_like(self.logits[:UNLABELED], dtype=torch.float32)
        return losses.exact_feedback(
            self.logits[:UNLABELED], direction, weight=self.feedback, num_classes=self.classes
        )


def gradient(loss: Tensor, problem: Problem) -> Tensor:
    return torch.autograd.grad(loss, problem.logits)[0]


def everything(p: Problem) -> list[Tensor]:
    """All functions, all outputs, all gradients."""
    teacher, student, cosine = p.teacher(), p.student(), p.cosine()
    outs: list[Tensor] = [*teacher, *student, *cosine, *p.weak()]
    outs += [gradient(loss, p) for loss in (teacher.loss, student.loss, cosine.loss, p.exact())]
    for out, one_pass in (p.teacher_and_grad(), p.student_and_grad()):
        outs += [*out, one_pass]
    return [x.detach() for x in outs]
