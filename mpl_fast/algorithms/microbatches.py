"""Splits a rank's batch into microbatches: less memory, the same gradient.

Losses are means over the rows of a view, so the mean over microbatches of equal size is the loss of
the whole batch. Only batch norm differs: it normalizes each microbatch by itself.
"""

from collections.abc import Sequence

import torch

from mpl_fast.algorithms.base import Metrics
from mpl_fast.batch import Batch


def row_slices(rows: int, count: int) -> list[slice]:
    """`count` consecutive slices of equal length; `count` must divide `rows`."""
    size = rows // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """`count` batches of consecutive rows, which are views of the batch's memory."""
    if count == 1:
        return [batch]
    labeled, unlabeled = row_slices(len(batch.labels), count), row_slices(len(batch.weak), count)
    return [
        Batch(batch.labeled[x], batch.labels[x], batch.weak[u], batch.strong[u], batch.truth[u])
        for x, u in zip(labeled, unlabeled, strict=True)
    ]


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the microbatches; sums of those that are a sum and a count."""
    if len(metrics) == 1:
        return metrics[0]
    stacked = {name: torch.stack([part[name] for part in metrics]) for name in metrics[0]}
    return {name: rows.sum(0) if rows.ndim > 1 else rows.mean() for name, rows in stacked.items()}
