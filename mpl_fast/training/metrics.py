"""Means of a step's metrics, which stay on the device until somebody has to see them."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast.distributed import sum_over_ranks

Row = dict[str, float]
AHEAD = 2  # steps


class Due(NamedTuple):
    """An interval whose numbers are on their way to the host."""

    step: int  # steps done at its end
    names: list[str]
    numbers: Tensor  # on the host, once `arrived`
    arrived: torch.cuda.Event | None
    kept: Row  # what was known at its end


class Meter:
    """Sums metrics on the device, and the seconds that the loop waited for data on the host.

    Only finite values are summed: one bad batch does not hide the others of its interval.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None  # (2, metrics): sums of finite values, and their number
        self._steps, self._waited = 0, 0.0
        self._due: list[Due] = []
        self._began = time.perf_counter()

    def add(self, metrics: dict[str, Tensor], waited: float) -> None:
        """Takes in one step; starts a few small kernels and waits for nothing."""
        values = torch.stack([m.detach().float() for m in metrics.values()])
        finite = values.isfinite()
        now = torch.stack([torch.where(finite, values, 0.0), finite.float()])
        self._names = list(metrics)
        self._sum = now if self._sum is None else self._sum + now
        self._steps += 1
        self._waited += waited

    def close(self, step: int, kept: Row, last: dict[str, Tensor]) -> None:
        """Ends an interval with the step of this number, and sends it to the host.

        `kept` and the tensors of `last` (0-dim, as they are now, alike on all ranks) go into its
        row besides the means.
        """
        if self._sum is None:
            raise AssertionError("a row needs at least one step")
        sums = sum_over_ranks(self._sum)
        means = sums[0] / sums[1]  # NaN where no value was finite
        numbers = torch.cat([means, *(value.float()[None] for value in last.values())])
        arrived = None
        if numbers.is_cuda:
            numbers = _sent(numbers)
            arrived = torch.cuda.Event()
            arrived.record()
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        kept = {**kept, "steps": self._steps, "seconds": seconds}
        kept["data_wait"] = self._waited / max(seconds, 1e-9)
        self._due.append(Due(step, [*self._names, *last], numbers, arrived, kept))
        self._sum, self._steps, self._waited = None, 0, 0.0

    def rows(self, *, late: int = 0) -> list[tuple[int, Row]]:
        """Steps done and row of every interval that is due, but for the `late` newest ones.

        This is where the host waits for the device. `seconds` is wall time between two closings,
        `steps` their number, `data_wait` the share of the time spent waiting for images on this
        rank.
        """
        rows = []
        while len(self._due) > late:
            rows.append(self._row(self._due.pop(0)))
        return rows

    def _row(self, due: Due) -> tuple[int, Row]:
        if due.arrived is not None:
            due.arrived.synchronize()
        return due.step, dict(zip(due.names, due.numbers.tolist(), strict=True)) | due.kept

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (evaluation, checkpoints) out of the present
        interval."""
        self._began += seconds

    @property
    def empty(self) -> bool:
        """No step since the last interval was closed."""
        return self._sum is None


def _sent(numbers: Tensor) -> Tensor:
    """A copy in pinned memory, on its way."""
    room = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return room.copy_(numbers, non_blocking=True)


def non_finite(row: Row) -> str | None:
    """Name of the first value that is not a finite number, if there is one."""
    return next((name for name, value in row.items() if not math.isfinite(value)), None)


class QueueLimiter:
    """Keeps the host at most two steps ahead of a GPU, where a step is but a few launches: what is
    in the queue holds memory, and a signal would be heard late."""

    def __init__(self, device: torch.device) -> None:
        self._steps: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def step(self) -> None:
        """Call after each; waits for the one before the last."""
        if self._steps is None:
            return
        event = torch.cuda.Event()
        event.record()
        self._steps.append(event)
        if len(self._steps) > AHEAD:
            self._steps.pop(0).synchronize()
