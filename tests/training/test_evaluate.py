"""Top-1, top-5 and the count, by hand."""

import math
import time

import pytest
import torch
from torch import Tensor

from mpl_fast.algorithms.base import EvalEnsemble
from mpl_fast.errors import DataError
from mpl_fast.training.evaluate import evaluate
from mpl_fast.training.metrics import Meter, non_finite


class Fixed:
    """A voter whose logits are the images themselves."""

    def infer_average(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class One:
    """An algorithm with that voter."""

    learners: dict[str, object] = {}  # noqa: RUF012
    eval_ensemble = EvalEnsemble([Fixed()])  # type: ignore[list-item]


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
    meter.close(3, {"lr": 0.5}, {"last": torch.tensor(7.0)})
    ((step, row),) = meter.rows()
    assert step == 3 and row["a"] == 3.0 and row["b"] == -3.0 and row["steps"] == 3
    assert row["lr"] == 0.5 and row["last"] == 7.0 and non_finite(row) is None
    assert meter.empty


def test_meter_leaves_out_what_is_not_finite() -> None:
    meter = Meter()
    for a, b in ((1.0, math.nan), (math.inf, math.nan), (3.0, math.nan)):
        meter.add({"a": torch.tensor(a), "b": torch.tensor(b)}, waited=0.0)
    meter.close(3, {}, {})
    ((_, row),) = meter.rows()
    assert row["a"] == 2.0 and non_finite(row) == "b"


def test_a_late_row_has_the_time_of_its_own_interval() -> None:
    meter = Meter()
    for value, seconds in ((1.0, 0.2), (2.0, 0.02)):
        time.sleep(seconds)
        meter.add({"a": torch.tensor(value)}, waited=seconds / 2)
        meter.close(int(value), {}, {})
    (_, first), (_, second) = meter.rows()
    assert first["seconds"] >= 0.2 > second["seconds"] >= 0.02
    assert 0.0 < first["data_wait"] <= 0.5


def test_late_rows_come_in_order() -> None:
    meter = Meter()
    for value in (1.0, 2.0):
        meter.add({"a": torch.tensor(value)}, waited=0.0)
        meter.close(int(value), {}, {})
        assert [(s, r["a"]) for s, r in meter.rows(late=1)] == ([(1, 1.0)] if value == 2 else [])
    assert [(s, r["a"]) for s, r in meter.rows()] == [(2, 2.0)]
