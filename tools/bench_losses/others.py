"""Other projects' cross-entropies, where they are installed: Liger's and NVIDIA apex's."""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.losses import StudentOut
from tools.bench_losses.problems import SMOOTHING, Inputs, Shape

Lesson = Callable[[Inputs], tuple[StudentOut, Tensor]]


def has_liger() -> bool:
    """Whether Liger is installed."""
    return find_spec("liger_kernel") is not None


@cache
def apex_cross_entropy() -> Any:
    """NVIDIA's fused function; None without it. The registry's `apex` is a web toolkit instead."""
    try:
        module = importlib.import_module("apex.contrib.xentropy")
    except Exception:  # also what the other package's imports raise
        return None
    return getattr(module, "SoftmaxCrossEntropyLoss", None)


def liger(shape: Shape) -> Lesson:
    """Liger writes the gradient over the logits, and synchronizes."""
    module = importlib.import_module("liger_kernel.transformers")
    loss_of = module.LigerCrossEntropyLoss(label_smoothing=SMOOTHING)
    return _student(shape, lambda strong, pseudo: loss_of(strong, pseudo))


def apex(shape: Shape) -> Lesson:
    """Apex returns a loss for each row; no label is its padding."""
    function = apex_cross_entropy()

    def loss_of(strong: Tensor, pseudo: Tensor) -> Tensor:
        rows: Tensor = function.apply(strong, pseudo, SMOOTHING, -100, True)
        return rows.mean()

    return _student(shape, loss_of)


def _student(shape: Shape, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Lesson:
    """The student's loss is theirs, the labeled rows' is PyTorch's."""

    def lesson(x: Inputs) -> tuple[StudentOut, Tensor]:
        labeled = x.logits[: shape.labeled].detach()
        strong = x.logits[shape.labeled :].detach().requires_grad_()
        old = F.cross_entropy(labeled.float(), x.target)
        hits = (labeled.argmax(-1) == x.target).float().mean()
        loss = loss_of(strong, x.pseudo)
        (gradient,) = torch.autograd.grad(loss, strong)
        return StudentOut(loss, old, hits), gradient

    return lesson
