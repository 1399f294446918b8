"""What one training step receives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Labeled images and two views of unlabeled ones; row i of both views is the same image.

    A labeled-only recipe receives ``U == 0``. Images are channels_last in memory. Those that a
    loader gives lie in one piece of memory, in the order weak, labeled, strong: whatever a network
    sees together is a view of it (`joined`).
    """

    labeled: Tensor  # (L, 3, H, W) float, normalized, crop and flip
    labels: Tensor  # (L,) int64
    weak: Tensor  # (U, 3, H, W) crop and flip
    strong: Tensor  # (U, 3, H, W) the same crop, its own flip, RandAugment
    truth: Tensor  # (U,) int64, what the records say of the unlabeled images: for metrics only


def image_buffer(
    labeled: int, unlabeled: int, size: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized labeled, weak and strong images, neighbors in one piece of memory."""
    rows = torch.empty((labeled + 2 * unlabeled, size, size, 3), dtype=dtype, device=device)
    weak, middle, strong = rows.permute(0, 3, 1, 2).split([unlabeled, labeled, unlabeled])
    return middle, weak, strong


def joined(views: Sequence[Tensor]) -> Tensor:
    """All rows in one tensor: without a copy where they are neighbors in memory, in this order."""
    first = views[0]
    if len(views) == 1:
        return first
    memory, end, rows = first.untyped_storage().data_ptr(), first.storage_offset(), 0
    for view in views:
        here = view.untyped_storage().data_ptr() == memory and view.storage_offset() == end
        if not here or view.stride() != first.stride() or view.requires_grad:
            return torch.cat(tuple(views))
        rows += len(view)
        end += len(view) * view.stride(0)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
