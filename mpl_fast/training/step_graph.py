"""A training step as one CUDA graph: one launch in place of some thousands.

A graph repeats the same kernels on the same addresses. Images and random numbers are therefore
copied to fixed addresses, learning rates are tensors (`Learner` with ``graphs="step"``), and steps
with an equal `Algorithm.graph_key` share a graph. Steps without a key, and the first steps of each
key, which warm up, are launched kernel by kernel.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable

import torch

from mpl_fast.algorithms.base import Algorithm, Metrics
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.errors import ConfigError
from mpl_fast.learner.rng import StaticDraws

Replay = Callable[[], Metrics]
WARMUP = 3  # steps in which libraries choose algorithms and allocate memory


class StepGraph:
    """Replaces `Algorithm.step`, with bitwise equal results."""

    def __init__(
        self, algorithm: Algorithm, capture: Callable[[Replay], Replay] | None = None
    ) -> None:
        """`capture` returns a function that repeats its argument; tests may replace it."""
        # Not a method of this object, a cycle that would keep graphs and their memory at its end.
        self._algorithm, self._capture = algorithm, capture
        # One stream and one memory pool for all graphs, which run one after another.
        on_gpu = torch.cuda.is_available()
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._warmed: defaultdict[Hashable, int] = defaultdict(int)
        self._draws: defaultdict[Hashable, StaticDraws] = defaultdict(StaticDraws)
        self._replays: dict[Hashable, Replay] = {}
        self._batch: Batch | None = None

    def step(self, batch: Batch, t: int) -> Metrics:
        """As `Algorithm.step`; what it returns is overwritten by the next call."""
        key = self._algorithm.graph_key(t)
        if key is None:
            return self._algorithm.step(batch, t)
        key = key, *(learner.trunk_delayed for learner in self._algorithm.learners.values())
        if key not in self._replays and self._warmed[key] < WARMUP:
            self._warmed[key] += 1
            return self._on_side_stream(lambda: self._record_step(key, batch, t))
        static = self._copy_in(batch)
        draws = self._draws[key]
        draws.fill(t)
        if key not in self._replays:
            capture = self._capture or self._captured
            self._replays[key] = capture(lambda: self._static_step(draws, static, t))
        return self._replays[key]()

    def _record_step(self, key: Hashable, batch: Batch, t: int) -> Metrics:
        with self._draws[key].record():
            return self._algorithm.step(batch, t)

    def _static_step(self, draws: StaticDraws, batch: Batch, t: int) -> Metrics:
        with draws.replay():
            return self._algorithm.step(batch, t)

    def _copy_in(self, batch: Batch) -> Batch:
        """Copies a batch to the addresses that graphs read from."""
        if self._batch is None:
            labeled, size = batch.labeled, batch.labeled.shape[-1]
            room = image_buffer(len(labeled), len(batch.weak), size, labeled.dtype, labeled.device)
            labels, truth = torch.empty_like(batch.labels), torch.empty_like(batch.truth)
            self._batch = Batch(room[0], labels, room[1], room[2], truth)
        for static, given in zip(self._batch, batch, strict=True):
            static.copy_(given)
        return self._batch

    def _captured(self, work: Replay) -> Replay:
        """Captures what `work` launches; other threads, such as DALI's, may allocate meanwhile.

        Raises `ConfigError` for a network that copies from or to the host in each pass.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                metrics = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(_no_graph(error)) from error

        def replay() -> Metrics:
            graph.replay()
            return metrics

        return replay

    def _on_side_stream(self, work: Replay) -> Metrics:
        """Runs `work` on the stream on which graphs are captured."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            metrics = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics


def _no_graph(error: BaseException) -> str:
    """Why a step cannot be captured, by the first error, which the end of the capture follows."""
    while error.__context__ is not None:
        error = error.__context__
    reason = str(error).splitlines()[0].rstrip(".")
    return f"cuda_graphs step cannot capture a step of this network ({reason}): set cuda_graphs off"
