"""One network's logits of the labeled, weak and strong images of a batch, by name.

Logits are ordered labeled | weak | strong, which is what `losses.teacher_loss_and_grad` takes; no
other module depends on that order. Images are ordered weak | labeled | strong in memory
(`mpl_fast.batch`), so a forward pass over all of them, or over labeled and strong ones, copies
nothing.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpl_fast.batch import Batch
from mpl_fast.config.algorithms import NormBatches
from mpl_fast.learner import Learner
from mpl_fast.learner.rng import RngState, replay_rng, rng_state

View = Literal["labeled", "weak", "strong"]


class ViewLogits(NamedTuple):
    """Logits of a batch with L labeled and U unlabeled images, and their rows by view."""

    all: Tensor  # (L + 2U, C), rows labeled | weak | strong
    labeled: Tensor  # (L, C), a slice of `all`, as are the next two
    weak: Tensor  # (U, C)
    strong: Tensor  # (U, C)


def name_views(logits: Tensor, batch: Batch) -> ViewLogits:
    """Names the rows of logits ``(L + 2U, C)`` that are ordered labeled | weak | strong."""
    sizes = [len(batch.labeled), len(batch.weak), len(batch.strong)]
    return ViewLogits(logits, *logits.split(sizes))


@dataclass
class _Pass:
    """One forward pass over some views, and its logits once it was run."""

    images: dict[View, Tensor]
    gradient: bool = True
    rng: RngState | None = None  # before a pass without gradient that is repeated with it
    logits: Tensor | None = None


class Views:
    """Logits of a batch's views from one or two forward passes, each run when first needed.

    `bn_batches`: joint: one pass, so that batch norm normalizes all views as one batch. split: weak
    images have a pass of their own, without gradient unless `weak_gradient`. `recompute`:
    `detached_logits` keeps no activations, and `logits` repeats its pass with the same dropout.
    """

    def __init__(
        self,
        learner: Learner,
        batch: Batch,
        bn_batches: NormBatches = "joint",
        *,
        weak_gradient: bool = False,
        recompute: bool = False,
    ) -> None:
        self._learner, self._batch, self._recompute = learner, batch, recompute
        weak: dict[View, Tensor] = {"weak": batch.weak}
        others: dict[View, Tensor] = {"labeled": batch.labeled, "strong": batch.strong}
        if bn_batches == "joint":
            self._passes = [_Pass(weak | others)]
        else:
            self._passes = [_Pass(weak, gradient=weak_gradient), _Pass(others)]

    def detached_logits(self, view: View) -> Tensor:
        """Logits ``(U, C)`` of one view, constants; runs only the pass that holds the view."""
        pass_ = next(pass_ for pass_ in self._passes if view in pass_.images)
        if self._recompute and pass_.gradient and pass_.logits is None:
            pass_.rng = rng_state(self._learner.device)
            logits = self._learner.forward_no_grad(*pass_.images.values())
        else:
            logits = self._forward(pass_)
        return _by_view(logits, pass_.images)[view].detach()

    def logits(self) -> ViewLogits:
        """Logits of all views, with gradient."""
        rows: dict[View, Tensor] = {}
        # What ran without gradient runs first again: running statistics depend on the order.
        for pass_ in sorted(self._passes, key=lambda pass_: pass_.rng is None):
            rows |= _by_view(self._forward(pass_), pass_.images)
        ordered = torch.cat([rows["labeled"], rows["weak"], rows["strong"]])
        return name_views(ordered, self._batch)

    def _forward(self, pass_: _Pass) -> Tensor:
        if pass_.logits is None:
            replay = replay_rng(pass_.rng, self._learner.device) if pass_.rng else nullcontext()
            with torch.set_grad_enabled(pass_.gradient), replay:
                pass_.logits = self._learner(*pass_.images.values())
        return pass_.logits


def _by_view(logits: Tensor, images: dict[View, Tensor]) -> dict[View, Tensor]:
    sizes = [len(view) for view in images.values()]
    return dict(zip(images, logits.split(sizes), strict=True))
