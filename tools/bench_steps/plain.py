"""A training step of Meta Pseudo Labels as public code has it, written anew: what ours is measured
against.

It follows kekmodel/MPL-pytorch (main.py) in what it computes and in how it goes about it: eager
NCHW networks, images concatenated anew for teacher and student, losses of single operations,
autocast with a gradient scaler, a clipping norm that never clips, an average moved tensor by
tensor, optimizers as PyTorch gives them by default, and six numbers read by the host in each step.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.batch import Batch
from mpl_fast.config import LearnerConfig, MPLConfig

NEVER = 1e9  # the clipping norm that public code has by default


class Taught(NamedTuple):
    """What the teacher's pass leaves for later in the step."""

    strong: Tensor  # (U, C) logits with gradient
    labels: Tensor  # (U,) int64 of the weak views
    labeled: Tensor  # losses and the share of sure images, 0-dim
    consistency: Tensor
    own: Tensor  # loss with gradient
    mask: Tensor


class PlainStep:
    """Two networks and what trains them; `step` is called with one batch after another."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: MPLConfig,
        *,
        steps: int,
        device: torch.device,
        amp: bool = False,
    ) -> None:
        self.config, self.device, self.amp = config, device, amp
        self.teacher, self.student = teacher.to(device).train(), student.to(device).train()
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizers = [
            _sgd(network, learner)
            for network, learner in ((teacher, config.teacher), (student, config.student))
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                o, lambda t: 0.5 * (1.0 + math.cos(math.pi * t / steps))
            )
            for o in self.optimizers
        ]
        # On a CPU autocast is bfloat16, which needs no scaling.
        scaled = amp and device.type == "cuda"
        self.scalers = [torch.amp.GradScaler(device.type, enabled=scaled) for _ in range(2)]
        self.t = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """Both updates; returns what is logged, on the host."""
        taught = self.teacher_forward(batch)
        old, lesson = self.student_forward(batch, taught.labels)
        self.student_update(lesson)
        self.move_average()
        new = self.forward_batch_stats(batch)
        h = new - old
        loss = self.feedback_loss(taught, h)
        self.teacher_update(loss)
        self.t += 1
        values = (taught.labeled, taught.consistency, lesson, h, loss, taught.mask)
        return self.read(values) | {"step": float(self.t)}

    def teacher_forward(self, batch: Batch) -> Taught:
        """One pass over all views, and the teacher's own losses."""
        agree, n = self.config.consistency, len(batch.labels)
        with self._autocast():
            images = torch.cat((batch.labeled, batch.weak, batch.strong))
            logits = self.teacher(images)
            weak, strong = logits[n:].chunk(2)
            labeled = _smoothed(logits[:n], batch.labels, self.config.label_smoothing)
            soft = torch.softmax(weak.detach() / agree.temperature, dim=-1)
            sure, labels = torch.max(soft, dim=-1)
            mask = sure.ge(agree.threshold).to(soft.dtype)
            rows = -(soft * torch.log_softmax(strong, dim=-1)).sum(dim=-1)
            consistency = torch.mean(rows * mask)
            own = labeled + agree.weight_at(self.t) * consistency
        return Taught(strong, labels, labeled, consistency, own, mask.mean())

    def student_forward(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labeled loss before the update, and the loss on pseudo labels."""
        n = len(batch.labels)
        with self._autocast():
            images = torch.cat((batch.labeled, batch.strong))
            logits = self.student(images)
            old = F.cross_entropy(logits[:n].detach(), batch.labels)
            return old, _smoothed(logits[n:], labels, self.config.label_smoothing)

    def student_update(self, loss: Tensor) -> None:
        """Backward pass, clipping, SGD."""
        self._update(1, self.student, loss)

    def teacher_update(self, loss: Tensor) -> None:
        """Backward pass, clipping, SGD; then both networks' gradients are forgotten."""
        self._update(0, self.teacher, loss)
        self.teacher.zero_grad()
        self.student.zero_grad()

    @torch.no_grad()
    def move_average(self) -> None:
        """One tensor after another; statistics are copied."""
        decay = self.config.student.ema
        pairs = zip(self.average.parameters(), self.student.parameters(), strict=True)
        for kept, new in pairs:
            kept.copy_(kept * decay + new * (1.0 - decay))
        buffers = zip(self.average.buffers(), self.student.buffers(), strict=True)
        for statistic, now in buffers:
            statistic.copy_(now)

    @torch.no_grad()
    def forward_batch_stats(self, batch: Batch) -> Tensor:
        """The labeled loss after the update; a training pass, which moves the statistics again."""
        with self._autocast():
            return F.cross_entropy(self.student(batch.labeled), batch.labels)

    def feedback_loss(self, taught: Taught, h: Tensor) -> Tensor:
        """The teacher's losses and h times the cross-entropy with the strong view's arg-max."""
        with self._autocast():
            labels = torch.max(taught.strong.detach(), dim=-1)[1]
            return taught.own + h * F.cross_entropy(taught.strong, labels)

    def read(self, values: tuple[Tensor, ...]) -> dict[str, float]:
        """Six numbers, one after another; each waits for the device."""
        names = ("loss/labeled", "loss/consistency", "loss/student", "h", "loss/teacher", "mask")
        return {name: value.item() for name, value in zip(names, values, strict=True)}

    def _update(self, which: int, network: nn.Module, loss: Tensor) -> None:
        optimizer, scaler = self.optimizers[which], self.scalers[which]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), NEVER)
        scaler.step(optimizer)
        scaler.update()
        self.schedules[which].step()

    def _autocast(self) -> torch.autocast:
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.amp)


def _smoothed(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels, written out."""
    log_p = F.log_softmax(logits, dim=-1)
    right = -log_p.gather(dim=-1, index=labels[:, None])[:, 0]
    return ((1.0 - label_smoothing) * right - label_smoothing * log_p.mean(dim=-1)).mean()


def _sgd(network: nn.Module, config: LearnerConfig) -> torch.optim.SGD:
    """Everything is decayed but what has "bn" in its name."""
    named = list(network.named_parameters())
    groups = [
        {"params": [p for n, p in named if ("bn" in n) is norm], "weight_decay": decay}
        for norm, decay in ((False, config.weight_decay), (True, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.nesterov)
