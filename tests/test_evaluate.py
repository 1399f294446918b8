"""Top-1, top-5 and the count, by hand."""

import pytest
import torch
from torch import Tensor

from mpl_fast.algorithms.base import Voters
from mpl_fast.errors import DataError
from mpl_fast.evaluate import evaluate
from mpl_fast.metrics import Meter, non_finite


class Fixed:
    """A voter whose logits are the images themselves."""

    def infer_average(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class One:
    """An algorithm with that voter."""

    learners: dict[str, object] = {}  # noqa: RUF012
    voters = Voters([Fixed()])  # type: ignore[list-item]


def images(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


BATCHES = [
    # right at once; right among five; wrong
    (
        images([9, 1, 2, 3, 4, 5], [5, 9, 8, 7, 6, 1], [0, 9, 8, 7, 6, 5]),
        torch.tensor([0, 0, 0]),
        3,
    ),
    # the second row is padding
    (images([0, 9, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0]), torch.tensor([1, 1]), 1),
]


def test_counts_what_counts() -> None:
    found = evaluate(One(), BATCHES, 4)  # type: ignore[arg-type]
    assert found == {"top1": 50.0, "top5": 75.0, "count": 4}


def test_a_missing_image_is_an_error() -> None:
    with pytest.raises(DataError, match="saw 4 images, the manifest lists 5"):
        evaluate(One(), BATCHES, 5)  # type: ignore[arg-type]


def test_meter_means_over_its_steps() -> None:
    meter = Meter()
    assert meter.empty
    for value in (1.0, 2.0, 6.0):
        meter.add({"a": torch.tensor(value), "b": torch.tensor(-value)}, waited=0.0)
    row = meter.row()
    assert row["a"] == 3.0 and row["b"] == -3.0 and row["steps"] == 3
    assert meter.empty
    meter.add({"a": torch.tensor(float("nan")), "b": torch.tensor(1.0)}, waited=0.0)
    assert non_finite(meter.row()) == "a"
    assert non_finite(row) is None
