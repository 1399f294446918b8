"""Batch norm's running statistics: averaged over ranks, and kept clean of batches that are not
finite."""

import torch
from torch import Tensor, nn

from mpl_fast.models.frozen import FrozenNorm


class BatchNormStats:
    """What training passes move in a network, with the last good values of it."""

    def __init__(self, network: nn.Module) -> None:
        # Not those of frozen norms, which no pass moves.
        moving = (m for m in network.modules() if not isinstance(m, FrozenNorm))
        buffers = [b for m in moving for b in m.buffers(recurse=False) if b.is_floating_point()]
        self.tensors: list[Tensor] = buffers
        self.snapshot()

    def snapshot(self) -> None:
        """Takes the present values for good ones."""
        if self.tensors:
            self._good = self._flat()

    @torch.no_grad()
    def rollback(self, finite: Tensor | None = None) -> None:
        """Puts the last good values back where the new ones are not finite, or, all of them, where
        the whole batch was not `finite` (0-dim bool on the device)."""
        if not self.tensors:
            return
        new = self._flat()
        fine = new.isfinite() if finite is None else new.isfinite() & finite
        self._good.copy_(torch.where(fine, new, self._good))
        chunks = self._good.split([t.numel() for t in self.tensors])
        torch._foreach_copy_(
            self.tensors, [c.view_as(t) for c, t in zip(chunks, self.tensors, strict=True)]
        )

    def _flat(self) -> Tensor:
        return torch.cat([t.flatten() for t in self.tensors])
