"""Accuracy on the validation split: every image counts exactly once, on any number of ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mpl_fast.algorithms.base import Algorithm, predict
from mpl_fast.distributed import sum_over_ranks
from mpl_fast.errors import DataError
from mpl_fast.learner.compilation import mark_step


@torch.no_grad()
def evaluate(
    algorithm: Algorithm, batches: Iterable[tuple[Tensor, Tensor, int]], expected: int
) -> dict[str, float]:
    """Top-1 and top-5 in percent and the number of images, of the voters' averaged weights.

    `batches` yields images ``(B, 3, H, W)``, labels ``(B,)`` int64 and how many leading rows count.
    Raises `DataError` if the ranks together did not see `expected` images.
    """
    hits: Tensor | None = None
    for images, labels, count in batches:
        mark_step()
        correct = _hits(predict(algorithm, images)[:count], labels[:count])
        hits = correct if hits is None else hits + correct
    if hits is None:
        raise DataError("the validation split gave no image")
    top1, top5, count = (int(x) for x in sum_over_ranks(hits).tolist())
    if count != expected:
        raise DataError(f"validation saw {count} images, the manifest lists {expected}: pack again")
    return {"top1": 100.0 * top1 / count, "top5": 100.0 * top5 / count, "count": count}


def accuracy_line(accuracy: dict[str, float]) -> str:
    """What `evaluate` found, in words."""
    return "top-1 {top1:.2f} %, top-5 {top5:.2f} % of {count:.0f} images".format(**accuracy)


def _hits(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Right first guesses, right among five guesses, and rows: ``(3,)`` int64 on the device."""
    guesses = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    rows = torch.full((), len(labels), device=labels.device)
    return torch.stack([right[:, 0].sum(), right.sum(), rows])
