"""What one training step receives."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Labeled images and two views of unlabeled ones; row i of both views is the same image.

    A labeled-only recipe receives ``U == 0``. Images are channels_last in memory.
    """

    labeled: Tensor  # (L, 3, H, W) float, normalized, crop and flip
    labels: Tensor  # (L,) int64
    weak: Tensor  # (U, 3, H, W) crop and flip
    strong: Tensor  # (U, 3, H, W) the same crop, its own flip, RandAugment
    truth: Tensor  # (U,) int64, what the records say of the unlabeled images: for metrics only
