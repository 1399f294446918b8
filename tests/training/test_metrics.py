"""Means of metrics over steps, by name."""

import itertools
import math

import pytest
import torch

from mpl_fast.training.metrics import Meter, Row, non_finite

NONE = (0.0, 0.0)  # no wait


def add(meter: Meter, waited: float = 0.0, **values: float) -> None:
    meter.add({name: torch.tensor(value) for name, value in values.items()}, (50.0, 50.0 + waited))


def closed(meter: Meter, step: int = 3) -> Row:
    """The row of the present interval."""
    meter.close(step, {}, {})
    ((_, row),) = meter.rows()
    return row


def test_means_over_steps() -> None:
    meter = Meter()
    assert meter.empty
    for value in (1.0, 2.0, 6.0):
        add(meter, a=value, b=-value)
    meter.close(3, {"lr": 0.5}, {"last": torch.tensor(7.0)})
    ((step, row),) = meter.rows()
    assert step == 3 and row["a"] == 3.0 and row["b"] == -3.0 and row["steps"] == 3
    assert row["lr"] == 0.5 and row["last"] == 7.0 and non_finite(row) is None
    assert meter.empty
    with pytest.raises(AssertionError, match="at least one step"):
        meter.close(4, {}, {})


def test_metrics_in_another_order_are_summed_by_name() -> None:
    meter = Meter()
    add(meter, a=1.0, b=10.0)
    add(meter, b=30.0, a=3.0)
    row = closed(meter)
    assert row["a"] == 2.0 and row["b"] == 20.0


def test_metrics_that_only_some_steps_return_have_their_own_mean() -> None:
    meter = Meter()
    add(meter, a=1.0, b=10.0)
    add(meter, a=3.0, c=5.0)
    add(meter, c=7.0, b=math.nan, a=5.0)
    row = closed(meter)
    assert (row["a"], row["b"], row["c"], row["steps"]) == (3.0, 10.0, 6.0, 3)
    add(meter, c=1.0)
    assert closed(meter).keys() & {"a", "b", "c"} == {"c"}  # nothing is left of the last interval


def test_metrics_that_are_a_sum_and_a_count() -> None:
    """Their mean is over what was counted; they are not in a row in which that was nothing."""
    meter = Meter()
    for right, known in ((1.0, 2.0), (0.0, 0.0), (3.0, 4.0)):
        meter.add({"share": torch.tensor([right, known]), "a": torch.tensor(right)}, NONE)
    row = closed(meter)
    assert (row["share"], row["a"]) == pytest.approx((4 / 6, 4 / 3))
    meter.add({"a": torch.tensor(1.0), "share": torch.zeros(2)}, NONE)
    row = closed(meter)
    assert "share" not in row and row["a"] == 1.0 and non_finite(row) is None
    meter.add({"a": torch.tensor(math.nan), "share": torch.zeros(2)}, NONE)
    assert non_finite(closed(meter)) == "a"


def test_values_that_are_not_finite_are_left_out() -> None:
    meter = Meter()
    for a, b in ((1.0, math.nan), (math.inf, math.nan), (3.0, math.nan)):
        add(meter, a=a, b=b)
    row = closed(meter)
    assert row["a"] == 2.0 and non_finite(row) == "b"


def test_a_late_row_has_the_time_of_its_own_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([100.0, 102.0, 102.5])
    monkeypatch.setattr("mpl_fast.training.metrics.time.perf_counter", lambda: next(clock))
    meter = Meter()
    for step, waited in ((1, 1.0), (2, 0.125)):
        add(meter, waited, a=1.0)
        meter.close(step, {}, {})
    (_, first), (_, second) = meter.rows()
    assert (first["train_seconds"], second["train_seconds"]) == (2.0, 0.5)
    assert (first["data_wait"], second["data_wait"]) == (0.5, 0.25)


class Event:
    """In place of a CUDA event, whose time must not be read before the row is due."""

    due = False

    def elapsed_time(self, end: "Event") -> float:
        assert self.due and end is not self
        return 250.0  # ms


def test_waits_of_a_gpu_are_read_late_from_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("mpl_fast.training.metrics.time.perf_counter", lambda: next(clock))
    meter = Meter()
    for _ in range(4):
        meter.add({"a": torch.tensor(1.0)}, (Event(), Event()))  # type: ignore[arg-type]
    meter.close(4, {}, {})
    monkeypatch.setattr(Event, "due", True)
    ((_, row),) = meter.rows()
    assert row["data_wait"] == 0.5


def test_a_pause_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0])
    monkeypatch.setattr("mpl_fast.training.metrics.time.perf_counter", lambda: next(clock))
    meter = Meter()
    add(meter, a=1.0)
    meter.pause(3.0)
    assert closed(meter)["train_seconds"] == 2.0


def test_late_rows_come_in_order() -> None:
    meter = Meter()
    for value in (1.0, 2.0):
        add(meter, a=value)
        meter.close(int(value), {}, {})
        assert [(s, r["a"]) for s, r in meter.rows(late=1)] == ([(1, 1.0)] if value == 2 else [])
    assert [(s, r["a"]) for s, r in meter.rows()] == [(2, 2.0)]
