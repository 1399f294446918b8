"""A batch in parts, computed one after the other, so that a large one needs less memory.

Losses are means over all rows of a kind, so that the mean over equal parts is the whole batch's.
Only batch norm sees the difference: it normalizes each part by itself.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpl_fast.algorithms.base import Metrics
from mpl_fast.batch import Batch
from mpl_fast.learner import Term


def slices(rows: int, count: int) -> list[slice]:
    """Equal ones; `count` divides `rows`."""
    size = rows // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """Rows one after another, of labeled and of unlabeled images."""
    if count == 1:
        return [batch]
    rows = zip(slices(len(batch.labels), count), slices(len(batch.weak), count), strict=True)
    return [
        Batch(batch.labeled[x], batch.labels[x], batch.weak[u], batch.strong[u], batch.truth[u])
        for x, u in rows
    ]


def scaled(terms: Sequence[Term], count: int) -> Iterator[Term]:
    """Terms of one part's loss, as they enter the mean over `count` parts."""
    for term in terms:
        if count == 1:
            yield term
        elif isinstance(term, Tensor):
            yield term / count
        else:
            yield term[0], term[1] / count


def mean_metrics(told: Sequence[Metrics]) -> Metrics:
    """Of what all parts tell."""
    if len(told) == 1:
        return told[0]
    return {name: torch.stack([part[name] for part in told]).mean() for name in told[0]}
