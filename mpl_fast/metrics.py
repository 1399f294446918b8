"""Means of a step's metrics that stay on the device until a row is due."""

import math
import time

import torch
from torch import Tensor

from mpl_fast.distributed import mean_over_ranks

Row = dict[str, float]


class Meter:
    """Sums metrics on the device, and the seconds that the loop waited for data on the host."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._steps = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def add(self, metrics: dict[str, Tensor], waited: float) -> None:
        """Takes in one step; starts a small kernel and waits for nothing."""
        values = torch.stack([m.detach().float() for m in metrics.values()])
        self._names = list(metrics)
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1
        self._waited += waited

    def row(self) -> Row:
        """Means over the steps since the last row and over ranks, then starts anew.

        This is where the host waits for the device. `seconds` is wall time of the interval,
        `steps` their number, `data_wait` the share of the time spent waiting for images on this
        rank.
        """
        if self._sum is None:
            raise AssertionError("a row needs at least one step")
        values = (mean_over_ranks(self._sum) / self._steps).tolist()
        now = time.perf_counter()
        seconds = now - self._began
        row = dict(zip(self._names, values, strict=True))
        row |= {"steps": self._steps, "seconds": seconds}
        row["data_wait"] = self._waited / max(seconds, 1e-9)
        self._sum, self._steps, self._waited, self._began = None, 0, 0.0, now
        return row

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (evaluation, checkpoints) out of the present
        interval."""
        self._began += seconds

    @property
    def empty(self) -> bool:
        """No step since the last row."""
        return self._sum is None


def non_finite(row: Row) -> str | None:
    """Name of the first value that is not a finite number, if there is one."""
    return next((name for name, value in row.items() if not math.isfinite(value)), None)
