"""One network's logits of a batch's three views: in one forward pass or two, now or later."""

import torch
from torch import Tensor

from mpl_fast.batch import Batch
from mpl_fast.config.algorithms import NormBatches
from mpl_fast.learner import Learner
from mpl_fast.learner.rng import RngState, replay_rng, rng_state

JOINT = (("weak", "labeled", "strong"),)  # as they lie in memory
SPLIT = (("weak",), ("labeled", "strong"))


class Views:
    """Logits of labeled, weak and strong images, each computed once.

    `joint`: batch norm sees all of them as one batch. `split`: weak images by themselves, and
    without gradient unless `weak_gradient`. Passes run when they are first asked for. With
    `recompute`, `detached_logits` keeps nothing for the backward pass, and `logits`
    computes the same again.
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
        self._learner, self._batch = learner, batch
        self._passes = JOINT if bn_batches == "joint" else SPLIT
        self._weak_gradient, self._recompute = weak_gradient, recompute
        self._done: dict[tuple[str, ...], Tensor] = {}
        self._dropouts: dict[tuple[str, ...], RngState] = {}

    def detached_logits(self, view: str) -> Tensor:
        """Logits ``(U, C)`` of one view of the unlabeled images, as constants."""
        names = next(names for names in self._passes if view in names)
        if names not in self._done and self._recompute and self._needs_gradient(names):
            self._dropouts[names] = rng_state(self._learner.device)
            logits = self._learner.forward_no_grad(*self._images(names))
        else:
            logits = self._run(names)
        return self._rows(names, logits)[view].detach()

    def logits(self) -> Tensor:
        """Rows labeled | weak | strong, ``(L + 2U, C)``, with gradient."""
        rows = {}
        # In the order of `hold`, what was peeked at first: running statistics remember the order.
        for names in sorted(self._passes, key=lambda names: names not in self._dropouts):
            rows.update(self._rows(names, self._run(names)))
        return torch.cat([rows[name] for name in ("labeled", "weak", "strong")])

    def clear(self) -> None:
        """Frees what was computed."""
        self._done.clear()

    def _run(self, names: tuple[str, ...]) -> Tensor:
        if names not in self._done:
            with torch.set_grad_enabled(self._needs_gradient(names)):
                if names in self._dropouts:
                    with replay_rng(self._dropouts[names], self._learner.device):
                        self._done[names] = self._learner(*self._images(names))
                else:
                    self._done[names] = self._learner(*self._images(names))
        return self._done[names]

    def _needs_gradient(self, names: tuple[str, ...]) -> bool:
        return names != ("weak",) or self._weak_gradient

    def _images(self, names: tuple[str, ...]) -> list[Tensor]:
        return [getattr(self._batch, name) for name in names]

    def _rows(self, names: tuple[str, ...], logits: Tensor) -> dict[str, Tensor]:
        sizes = [len(images) for images in self._images(names)]
        return dict(zip(names, logits.split(sizes), strict=True))
