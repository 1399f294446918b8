"""What one training step receives, and the protocol of what supplies it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mpl_fast.errors import DataError


class Batch(NamedTuple):
    """Labeled images and two views of unlabeled ones; row i of both views is the same image.

    A labeled-only recipe receives ``U == 0``. Images are channels_last. A loader's images are in
    one piece of memory, in the order weak, labeled, strong (`image_buffer`): all of them, and
    labeled with strong, can then be passed to a network without a copy (`joined`). The order of
    the fields has no other meaning.
    """

    labeled: Tensor  # (L, 3, H, W) float, crop and flip, or data.labeled_view strong
    labels: Tensor  # (L,) int64
    weak: Tensor  # (U, 3, H, W) crop and flip
    strong: Tensor  # (U, 3, H, W) weak's crop or its own, its own flip, RandAugment
    truth: Tensor  # (U,) int64, labels that unlabeled images have, or -1: for metrics only


class Loader(Protocol):
    """Endless training batches of one rank. `data.loader.TrainLoader` is the one of this package;
    `training.build.train_loader` is where another one would be constructed."""

    def __next__(self) -> Batch:
        """The next batch. Raises `DataError` for records that cannot be read."""

    def state(self) -> Mapping[str, str | bytes]:
        """The position after the last batch returned, for checkpoints: a loader constructed with
        it continues from there, bit for bit."""


EvalBatches = Iterable[tuple[Tensor, Tensor, int]]
"""One pass over this rank's validation images: images (B, 3, H, W), labels (B,) int64, and how many
leading rows are valid. Every rank has equally many batches."""


def image_buffer(
    labeled: int, unlabeled: int, size: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized labeled, weak and strong images: views of one tensor, in the order weak,
    labeled, strong."""
    rows = torch.empty((labeled + 2 * unlabeled, size, size, 3), dtype=dtype, device=device)
    weak, middle, strong = rows.permute(0, 3, 1, 2).split([unlabeled, labeled, unlabeled])
    return middle, weak, strong


def within_classes(labels: Tensor, classes: int, lowest: int = 0) -> tuple[Tensor, Tensor]:
    """Labels clamped to ``lowest`` to ``classes - 1``, and how many were outside: 0-dim, on the
    device, so that the host does not wait. A label outside would end a CUDA process."""
    valid = labels.clamp(lowest, classes - 1)
    return valid, (valid != labels).sum()


def wrong_labels(count: float, split: str, classes: int, root: object) -> DataError:
    """The error for labels outside the classes."""
    return DataError(
        f"{root}: {count:.0f} labels of split {split} are not those of classes, 0 to "
        f"{classes - 1}: its records are damaged or were replaced; `make_rec.py verify {root}` "
        "finds which"
    )


def joined(views: Sequence[Tensor]) -> Tensor:
    """The concatenation along rows: without a copy if the views are adjacent in memory, in this
    order."""
    first = views[0]
    if len(views) == 1:
        return first
    memory, end, rows = first.untyped_storage().data_ptr(), first.storage_offset(), 0
    for view in views:
        adjacent = view.untyped_storage().data_ptr() == memory and view.storage_offset() == end
        if not adjacent or view.stride() != first.stride() or view.requires_grad:
            return torch.cat(tuple(views))
        rows += len(view)
        end += len(view) * view.stride(0)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
