"""Batch norm's running statistics: restored after a bad batch, or left out of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpl_fast.models.frozen import FrozenNorm


class BatchNormStats:
    """The running statistics of a network, with their last finite values."""

    def __init__(self, network: nn.Module) -> None:
        # Frozen norms have statistics that no pass updates.
        updated = (m for m in network.modules() if not isinstance(m, FrozenNorm))
        buffers = [b for m in updated for b in m.buffers(recurse=False) if b.is_floating_point()]
        self.tensors: list[Tensor] = buffers
        self.snapshot()

    def snapshot(self) -> None:
        """Saves the present values as the ones that `rollback` restores."""
        if self.tensors:
            self._saved = self._flat()

    @torch.no_grad()
    def rollback(self, finite: Tensor | None = None) -> None:
        """Restores the last finite values of elements that are not finite, and all of them where
        `finite` (0-dim bool on the device: whether the batch's gradient was) is false."""
        if not self.tensors:
            return
        new = self._flat()
        good = new.isfinite() if finite is None else new.isfinite() & finite
        self._saved.copy_(torch.where(good, new, self._saved))
        chunks = self._saved.split([t.numel() for t in self.tensors])
        torch._foreach_copy_(
            self.tensors, [c.view_as(t) for c, t in zip(chunks, self.tensors, strict=True)]
        )

    def _flat(self) -> Tensor:
        return torch.cat([t.flatten() for t in self.tensors])


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalizes by the batch and leaves its running statistics alone.

    In evaluation mode as well: without running statistics a batch norm has nothing else. Frozen
    norms keep normalizing by their statistics.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.bias is None or m.bias.requires_grad]  # scales may be fixed
    saved = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (mean, var, count) in zip(norms, saved, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
