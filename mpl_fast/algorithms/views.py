"""One network's logits of the labeled, weak and strong images of a batch, by name.

Logits are ordered labeled | weak | strong, which is what `losses.teacher_loss_and_grad` takes; only
this module knows that order. Images lie weak | labeled | strong in memory (`mpl_fast.batch`), so a
forward pass over all of them, or over labeled and strong ones, copies nothing.
"""

from contextlib import nullcontext
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
        weak: dict[View, Tensor] = {"weak": batch.weak}
        others: dict[View, Tensor] = {"labeled": batch.labeled, "strong": batch.strong}
        if bn_batches == "joint":
            self._passes = [_Pass(learner, weak | others, recompute=recompute)]
        else:
            first = _Pass(learner, weak, gradient=weak_gradient, recompute=recompute)
            self._passes = [first, _Pass(learner, others, recompute=recompute)]
        self._batch = batch

    def detached_logits(self, view: View) -> Tensor:
        """Logits ``(U, C)`` of one view, constants; runs only the pass that holds the view."""
        return next(p for p in self._passes if view in p.images).detached()[view]

    def logits(self) -> ViewLogits:
        """Logits of all views, with gradient."""
        rows: dict[View, Tensor] = {}
        # What ran without gradient runs first again: running statistics depend on the order.
        for one in sorted(self._passes, key=lambda p: p.rng is None):
            rows |= one.logits()
        ordered = torch.cat([rows["labeled"], rows["weak"], rows["strong"]])
        return name_views(ordered, self._batch)


class _Pass:
    """A forward pass over some views, run when its logits are first needed."""

    def __init__(
        self,
        learner: Learner,
        images: dict[View, Tensor],
        *,
        gradient: bool = True,
        recompute: bool,
    ) -> None:
        self.images = images
        self.rng: RngState | None = None  # before the pass without gradient that is to be repeated
        self._learner, self._gradient = learner, gradient
        self._recompute = recompute and gradient
        self._logits: Tensor | None = None

    def detached(self) -> dict[View, Tensor]:
        if self._recompute and self._logits is None:
            self.rng = rng_state(self._learner.device)
            return self._by_view(self._learner.forward_no_grad(*self.images.values()))
        return {view: rows.detach() for view, rows in self.logits().items()}

    def logits(self) -> dict[View, Tensor]:
        if self._logits is None:
            replay = replay_rng(self.rng, self._learner.device) if self.rng else nullcontext()
            with torch.set_grad_enabled(self._gradient), replay:
                self._logits = self._learner(*self.images.values())
        return self._by_view(self._logits)

    def _by_view(self, logits: Tensor) -> dict[View, Tensor]:
        sizes = [len(images) for images in self.images.values()]
        return dict(zip(self.images, logits.split(sizes), strict=True))
