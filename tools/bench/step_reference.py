"""A plain PyTorch training step of Meta Pseudo Labels, as kekmodel/MPL-pytorch has it.

What our step is timed and checked against, here and in the tests. It follows that code (main.py) in
what it computes and how: eager NCHW networks, images concatenated anew for teacher and student,
losses of single operations, autocast with a gradient scaler, an average updated tensor by tensor,
PyTorch's default optimizer, and six numbers read by the host in each step. Of this project it
imports the batch only.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.batch import Batch


class Settings(NamedTuple):
    """Options of MPL-pytorch's command line, under its names, and the sign of the feedback."""

    teacher_lr: float
    student_lr: float
    total_steps: int
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.95
    lambda_u: float = 1.0  # weight of the consistency loss
    uda_steps: int = 0  # over which that weight grows from 0
    warmup_steps: int = 0
    student_wait_steps: int = 0
    ema: float = 0.995
    grad_clip: float = 1e9  # 0: no clipping
    feedback_sign: float = 1.0  # h = sign * (new - old); that code has 1, the paper -1


class StepValues(NamedTuple):
    """0-dim tensors of one step, and the pseudo labels ``(U,)`` int64."""

    labels: Tensor
    mask: Tensor  # share of the images that reach the threshold
    labeled: Tensor  # teacher's losses
    consistency: Tensor
    feedback: Tensor
    teacher: Tensor
    student: Tensor  # loss on pseudo labels
    old: Tensor  # labeled loss of the student before and after its update
    new: Tensor
    h: Tensor
    teacher_norm: Tensor  # of the gradient, before clipping
    student_norm: Tensor


class TeacherPass(NamedTuple):
    """What later parts of a step need of the teacher's forward pass."""

    strong: Tensor  # (U, C) logits with gradient
    labels: Tensor  # (U,) int64
    mask: Tensor
    labeled: Tensor
    consistency: Tensor
    own: Tensor  # labeled + weight * consistency, with gradient


class PlainStep:
    """Teacher, student, the student's average, and what trains them."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        settings: Settings,
        *,
        device: torch.device | None = None,
        amp: bool = False,
    ) -> None:
        self.settings, self.device, self.amp = settings, device or torch.device("cpu"), amp
        self.teacher, self.student = (n.to(self.device).train() for n in (teacher, student))
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizers = (
            _sgd(self.teacher, settings.teacher_lr, settings),
            _sgd(self.student, settings.student_lr, settings),
        )
        self.schedules = (
            _schedule(self.optimizers[0], 0, settings),
            _schedule(self.optimizers[1], settings.student_wait_steps, settings),
        )
        # On a CPU autocast is bfloat16, which needs no scaling.
        scaled = amp and self.device.type == "cuda"
        self.scalers = [torch.amp.GradScaler(self.device.type, enabled=scaled) for _ in range(2)]
        self.t = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """Both updates; returns what is logged, on the host."""
        return self.read(self.update(batch))

    def update(self, batch: Batch) -> StepValues:
        """Both updates, without reading any value."""
        teacher = self.teacher_forward(batch)
        old, student = self.student_forward(batch, teacher.labels)
        student_norm = self.student_update(student)
        self.update_average()
        new = self.labeled_loss(batch)
        h = self.settings.feedback_sign * (new - old)
        feedback, loss = self.teacher_loss(teacher, h)
        teacher_norm = self.teacher_update(loss)
        self.t += 1
        values = (teacher.labels, teacher.mask, teacher.labeled, teacher.consistency, feedback)
        return StepValues(*values, loss, student, old, new, h, teacher_norm, student_norm)

    def consistency_weight(self) -> float:
        """Of the step to come."""
        s = self.settings
        ramp = min(1.0, (self.t + 1) / s.uda_steps) if s.uda_steps else 1.0
        return s.lambda_u * ramp

    def learning_rates(self) -> tuple[float, float]:
        """Teacher's and student's, of the step to come."""
        teacher, student = (float(o.param_groups[0]["lr"]) for o in self.optimizers)
        return teacher, student

    def teacher_forward(self, batch: Batch) -> TeacherPass:
        """One pass over all views, and the teacher's own losses."""
        s, n = self.settings, len(batch.labels)
        with self._autocast():
            images = torch.cat((batch.labeled, batch.weak, batch.strong))
            logits = self.teacher(images)
            weak, strong = logits[n:].chunk(2)
            labeled = _smoothed(logits[:n], batch.labels, s.label_smoothing)
            soft = torch.softmax(weak.detach() / s.temperature, dim=-1)
            confidence, labels = torch.max(soft, dim=-1)
            mask = confidence.ge(s.threshold).to(soft.dtype)
            rows = -(soft * torch.log_softmax(strong, dim=-1)).sum(dim=-1)
            consistency = torch.mean(rows * mask)
            own = labeled + self.consistency_weight() * consistency
        return TeacherPass(strong, labels, mask.mean(), labeled, consistency, own)

    def student_forward(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labeled loss before the update, and the loss on pseudo labels."""
        n = len(batch.labels)
        with self._autocast():
            images = torch.cat((batch.labeled, batch.strong))
            logits = self.student(images)
            old = F.cross_entropy(logits[:n].detach(), batch.labels)
            return old, _smoothed(logits[n:], labels, self.settings.label_smoothing)

    def student_update(self, loss: Tensor) -> Tensor:
        """Backward pass, clipping, SGD; returns the gradient's norm."""
        return self._update(1, self.student, loss)

    def teacher_update(self, loss: Tensor) -> Tensor:
        """The same; then the gradients of both networks are cleared."""
        norm = self._update(0, self.teacher, loss)
        self.teacher.zero_grad()
        self.student.zero_grad()
        return norm

    @torch.no_grad()
    def update_average(self) -> None:
        """One tensor after another; batch-norm statistics are copied."""
        decay = self.settings.ema
        pairs = zip(self.average.parameters(), self.student.parameters(), strict=True)
        for kept, new in pairs:
            kept.copy_(kept * decay + new * (1.0 - decay))
        buffers = zip(self.average.buffers(), self.student.buffers(), strict=True)
        for statistic, now in buffers:
            statistic.copy_(now)

    @torch.no_grad()
    def labeled_loss(self, batch: Batch) -> Tensor:
        """Of the student, in training mode: its batch-norm statistics change again."""
        with self._autocast():
            return F.cross_entropy(self.student(batch.labeled), batch.labels)

    def teacher_loss(self, teacher: TeacherPass, h: Tensor) -> tuple[Tensor, Tensor]:
        """Feedback and whole loss: h times the cross-entropy with the strong view's arg-max."""
        with self._autocast():
            labels = torch.max(teacher.strong.detach(), dim=-1)[1]
            feedback = h * F.cross_entropy(teacher.strong, labels)
            return feedback, teacher.own + feedback

    def read(self, values: StepValues) -> dict[str, float]:
        """Six numbers, one after another; each waits for the device."""
        return {
            "loss/labeled": values.labeled.item(),
            "loss/consistency": values.consistency.item(),
            "loss/student": values.student.item(),
            "feedback": values.h.item(),
            "loss/teacher": values.teacher.item(),
            "mask": values.mask.item(),
        }

    def _update(self, which: int, network: nn.Module, loss: Tensor) -> Tensor:
        optimizer, scaler = self.optimizers[which], self.scalers[which]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit = self.settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
        self.schedules[which].step()
        return norm

    def _autocast(self) -> torch.autocast:
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.amp)


def _smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels, written out."""
    log_p = F.log_softmax(logits, dim=-1)
    right = -log_p.gather(dim=-1, index=labels[:, None])[:, 0]
    return ((1.0 - smoothing) * right - smoothing * log_p.mean(dim=-1)).mean()


def _sgd(network: nn.Module, lr: float, settings: Settings) -> torch.optim.SGD:
    """Everything is decayed but what has "bn" in its name."""
    named, s = list(network.named_parameters()), settings
    groups = [
        {"params": [p for n, p in named if ("bn" in n) is norm], "weight_decay": decay}
        for norm, decay in ((False, s.weight_decay), (True, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    nesterov = s.nesterov and s.momentum > 0.0  # without momentum both are the same step
    return torch.optim.SGD(groups, lr, momentum=s.momentum, nesterov=nesterov)


def _schedule(
    optimizer: torch.optim.Optimizer, wait: int, settings: Settings
) -> torch.optim.lr_scheduler.LambdaLR:
    """0 while waiting, then linear warm-up, then half a cosine."""
    first, total = wait + settings.warmup_steps, settings.total_steps

    def share(t: int) -> float:
        if t < wait:
            return 0.0
        if t < first:
            return t / first
        return 0.5 * (1.0 + math.cos(math.pi * (t - first) / max(1, total - first)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
