"""Means of training metrics over an interval of steps, summed on the device without waiting."""

import math
import statistics
import time
from collections import deque
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mpl_fast.distributed import rank, seconds_waited, sum_over_ranks, world_size

Row = dict[str, float]
MAX_QUEUED_STEPS = 2
RANK_SECONDS = "rank_seconds/"
MEDIAN_OF, LEAST_MEDIAN = 20, 0.1  # rows, and loss: of few labels it may come close to 0
Moment = float | torch.cuda.Event
Wait = tuple[Moment, Moment]  # its begin and its end


class PendingRow(NamedTuple):
    """An interval whose values are being copied to the host."""

    step: int  # steps done at its end
    names: list[str]
    values: Tensor  # on the host, valid once `copied` has completed
    copied: torch.cuda.Event | None  # None on a CPU
    host_values: Row
    waits: list[Wait]  # for images; valid once `copied` has completed
    counted: frozenset[str]  # means of sums and counts, of which the counts may be 0


def moment(device: torch.device) -> Moment:
    """Now, in seconds; on a GPU an event that has the time when the work queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Meter:
    """Sums each metric by its name on the device, and the time spent waiting for data.

    Only finite values are summed, so that one bad batch does not hide the others of its interval.
    Steps may return different metrics, in any order: the mean of a metric is over the steps that
    returned it, or, of metrics that are a sum and a count, over what was counted; it is not in the
    row if that is nothing. All ranks must return the same names within an interval.
    """

    def __init__(self) -> None:
        # For each tuple of names that a step returned: (2, names) sums and counts of finite values.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._steps, self._waits = 0, list[Wait]()
        self._own_seconds = list[float]()
        self._counted: frozenset[str] = frozenset()
        self._pending: list[PendingRow] = []
        self._began = time.perf_counter()

    def add(self, metrics: dict[str, Tensor], wait: Wait, exchanged: float = 0.0) -> None:
        """Adds one step's `algorithms.base.Metrics`, and its wait for images. `exchanged`:
        `distributed.seconds_waited` before the step.

        Launches a few small kernels and does not wait for the device.
        """
        means = {name: value for name, value in metrics.items() if value.ndim == 0}
        values = torch.stack([m.detach().float() for m in means.values()])
        finite = values.isfinite()
        step = torch.stack([torch.where(finite, values, 0.0), finite.float()])
        if counted := {name: value for name, value in metrics.items() if value.ndim}:
            pairs = [value.detach().float() for value in counted.values()]
            step = torch.cat([step, torch.stack(pairs, dim=1)], dim=1)
            self._counted |= counted.keys()
        names = (*means, *counted)
        self._sums[names] = self._sums[names] + step if names in self._sums else step
        self._steps += 1
        self._waits.append(wait)
        if world_size() > 1 and isinstance(wait[0], float):
            in_step = time.perf_counter() - wait[0]
            self._own_seconds.append(in_step - (seconds_waited() - exchanged))

    def close(self, step: int, host_values: Row, latest: dict[str, Tensor]) -> None:
        """Ends the interval after step number `step` and starts its copy to the host.

        `host_values`, and the present values of `latest` (0-dim tensors, equal on all ranks), are
        added to the row. Raises `AssertionError` if no step was added.
        """
        if self.empty:
            raise AssertionError("a row needs at least one step")
        names = list(dict.fromkeys(name for group in self._sums for name in group))
        columns = [_column(self._sums, name) for name in names]
        if world_size() > 1:
            names += [f"{RANK_SECONDS}{number}" for number in range(world_size())]
            columns += self._rank_seconds(columns[0].device)
        sums = sum_over_ranks(torch.stack(columns, dim=1))  # (2, names)
        means = sums[0] / sums[1]  # NaN where no value was finite, or nothing counted
        values = torch.cat([means, *(value.float()[None] for value in latest.values())])
        copied = None
        if values.is_cuda:
            values = _copy_to_host(values)
            copied = torch.cuda.Event()
            copied.record()
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        host_values = {**host_values, "steps": self._steps, "train_seconds": seconds}
        names += latest
        row = PendingRow(step, names, values, copied, host_values, self._waits, self._counted)
        self._pending.append(row)
        self._sums, self._steps, self._waits, self._own_seconds = {}, 0, [], []

    def _rank_seconds(self, device: torch.device) -> tuple[Tensor, ...]:
        """``(2,)`` of each rank: its median seconds in a step and 1, of other ranks zeros.

        On a CPU these are without exchanges between ranks. On a GPU a step is one queue of work,
        and they are the waits for images, of the steps that the device has completed.
        """
        own = self._own_seconds or [
            _seconds(began, ended)
            for began, ended in self._waits
            if isinstance(ended, torch.cuda.Event) and ended.query()
        ]
        columns = torch.zeros(world_size(), 2)
        if own:
            columns[rank()] = torch.tensor([statistics.median(own), 1.0])
        if device.type == "cuda":
            columns = columns.pin_memory().to(device, non_blocking=True)
        return columns.unbind()

    def rows(self, *, late: int = 0) -> list[tuple[int, Row]]:
        """Returns number of steps done and row of every closed interval but the `late` newest.

        Waits for the device until their values are copied. In a row `train_seconds` is the wall
        time between two calls of `close`, `steps` the number of steps, and `data_wait` the share of
        the time that this rank waited for images. On a GPU that is the device's time between a step
        and the next one's images: with DALI on the GPU the host never waits for them.
        """
        due = max(0, len(self._pending) - late)
        rows = [_row(pending) for pending in self._pending[:due]]
        del self._pending[:due]
        return rows

    def pause(self, seconds: float) -> None:
        """Excludes seconds of evaluation or checkpointing from the present interval."""
        self._began += seconds

    @property
    def empty(self) -> bool:
        """Whether no step was added since the last `close`."""
        return not self._sums


def _column(sums: dict[tuple[str, ...], Tensor], name: str) -> Tensor:
    """``(2,)``: sum and count of a metric over all steps that returned it."""
    parts = [part[:, names.index(name)] for names, part in sums.items() if name in names]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _copy_to_host(values: Tensor) -> Tensor:
    """An asynchronous copy in pinned memory."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _row(pending: PendingRow) -> tuple[int, Row]:
    if pending.copied is not None:
        pending.copied.synchronize()
    values = dict(zip(pending.names, pending.values.tolist(), strict=True))
    empty = [name for name in pending.counted & values.keys() if math.isnan(values[name])]
    for name in empty:
        del values[name]
    waited = sum(_seconds(began, ended) for began, ended in pending.waits)
    values["data_wait"] = waited / max(pending.host_values["train_seconds"], 1e-9)
    return pending.step, values | pending.host_values


def _seconds(began: Moment, ended: Moment) -> float:
    """Does not wait: events of a row have passed when its values are copied."""
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    first, last = cast(tuple[torch.cuda.Event, torch.cuda.Event], (began, ended))
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000.0


def pop_rank_seconds(row: Row, device: torch.device) -> list[float]:
    """Removes from a row the time that each rank needs for a step, and returns it; empty with one
    rank, or if it is not known.

    On a GPU the values are waits for images, and all ranks are taken to compute equally long: the
    one that waits longest determines the time of a step, in which others wait for it.
    """
    seconds = [row.pop(name) for name in [*row] if name.startswith(RANK_SECONDS)]
    if not all(map(math.isfinite, seconds)):
        return []
    if seconds and device.type == "cuda":
        step = row["train_seconds"] / row["steps"]
        seconds = [step - max(seconds) + one for one in seconds]
    return seconds


def non_finite(row: Row) -> str | None:
    """Name of the first value that is not a finite number, or None."""
    return next((name for name, value in row.items() if not math.isfinite(value)), None)


class QueueLimiter:
    """Keeps the host at most two steps, or batches of an evaluation, ahead of a GPU.

    Work in the queue holds memory, and a signal is only handled after the steps already queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def step(self) -> None:
        """To be called after each step; waits for the end of the step before the last."""
        if self._events is None:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > MAX_QUEUED_STEPS:
            self._events.pop(0).synchronize()


class Spikes:
    """Finds losses that are far above their median over the rows before."""

    def __init__(self) -> None:
        names = ("loss/labeled", "loss/student")
        self._before = {name: deque[float](maxlen=MEDIAN_OF) for name in names}

    def add(self, row: Row, factor: float) -> str:
        """Adds a row; what is above `factor` times its median, or an empty text."""
        for name, before in self._before.items():
            if name not in row:
                continue
            usual = statistics.median(before) if len(before) >= MEDIAN_OF // 4 else math.inf
            if row[name] > factor * max(usual, LEAST_MEDIAN):
                return f"{name} is {row[name]:.3g}, over {factor:g} times its median of {usual:.3g}"
            before.append(row[name])
        return ""
