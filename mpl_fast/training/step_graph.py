"""A whole training step as one CUDA graph: one launch in place of some thousands.

A graph repeats the same kernels on the same addresses. So images and random numbers are copied to
where it reads them, learning rates are tensors (`Learner` with ``graphs="step"``), and whatever
else depends on the number of the step must be constant: see an algorithm's `graph_key`. Until
then, and for the first steps of a phase, which warm up, steps run kernel by kernel.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable

import torch

from mpl_fast.algorithms.base import Algorithm, Metrics
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.learner.rng import StaticDraws

Replay = Callable[[], Metrics]
WARMUP = 3  # steps: libraries choose algorithms and allocate in the first ones


class StepGraph:
    """Runs an algorithm's steps; a drop-in for its `step`, bit for bit."""

    def __init__(
        self, algorithm: Algorithm, capture: Callable[[Replay], Replay] | None = None
    ) -> None:
        """`capture` makes a function that repeats what another one did; a test may give its own."""
        self._algorithm, self._capture = algorithm, capture or self._captured
        # One stream and one pool of memory for everything: the allocator keeps both apart, and
        # graphs run one after another.
        on_gpu = torch.cuda.is_available()
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._warmed: defaultdict[Hashable, int] = defaultdict(int)
        self._draws: defaultdict[Hashable, StaticDraws] = defaultdict(StaticDraws)
        self._replays: dict[Hashable, Replay] = {}
        self._batch: Batch | None = None

    def step(self, batch: Batch, t: int) -> Metrics:
        """As `Algorithm.step`; what it returns is overwritten by the next call."""
        phase = self._algorithm.graph_key(t)
        if phase is None:
            return self._algorithm.step(batch, t)
        if phase not in self._replays and self._warmed[phase] < WARMUP:
            self._warmed[phase] += 1
            return self._aside(lambda: self._noted_step(phase, batch, t))
        mine = self._take(batch)
        draws = self._draws[phase]
        draws.fill(t)
        if phase not in self._replays:
            self._replays[phase] = self._capture(lambda: self._step_in_place(draws, mine, t))
        return self._replays[phase]()

    def _noted_step(self, phase: Hashable, batch: Batch, t: int) -> Metrics:
        with self._draws[phase].noting():
            return self._algorithm.step(batch, t)

    def _step_in_place(self, draws: StaticDraws, batch: Batch, t: int) -> Metrics:
        with draws.in_place():
            return self._algorithm.step(batch, t)

    def _take(self, batch: Batch) -> Batch:
        """The batch, where graphs read it."""
        if self._batch is None:
            labeled, size = batch.labeled, batch.labeled.shape[-1]
            room = image_buffer(len(labeled), len(batch.weak), size, labeled.dtype, labeled.device)
            labels, truth = torch.empty_like(batch.labels), torch.empty_like(batch.truth)
            self._batch = Batch(room[0], labels, room[1], room[2], truth)
        for mine, given in zip(self._batch, batch, strict=True):
            mine.copy_(given)
        return self._batch

    def _captured(self, work: Replay) -> Replay:
        """A CUDA graph of what `work` launches; other threads, such as DALI's, may allocate."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            metrics = work()

        def replay() -> Metrics:
            graph.replay()
            return metrics

        return replay

    def _aside(self, work: Replay) -> Metrics:
        """On a stream of its own, as what is captured later wants it."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            metrics = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics
