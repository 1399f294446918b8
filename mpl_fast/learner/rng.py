"""Random numbers: equal on any number of ranks, replayed for dropout, fixed for CUDA graphs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpl_fast.config import RunConfig
from mpl_fast.distributed import DistEnv, rank, world_size
from mpl_fast.learner import compilation

UNIFORM, BETA = 1, 2  # separate streams of one seed and step


class Draw(NamedTuple):
    """Arguments of a draw of random numbers, without the step's number."""

    kind: int  # UNIFORM or BETA
    rows: int  # of this rank
    alpha: float
    seed: int


def uniform(count: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """This rank's ``(count,)`` float32 numbers in [0, 1), the same on a CPU and on a GPU.

    All ranks draw for the global batch and each keeps every world-th row, so together they have the
    numbers of one rank. They are a function of seed and step, so there is nothing to resume.
    """
    return _source(Draw(UNIFORM, count, 0.0, seed), step, device)


def beta(count: int, alpha: float, *, seed: int, step: int, device: torch.device) -> Tensor:
    """This rank's ``(count,)`` float32 Beta(alpha, alpha) draws, by the scheme of `uniform`."""
    return _source(Draw(BETA, count, alpha, seed), step, device)


def _draw(draw: Draw, step: int, device: torch.device) -> Tensor:
    numbers = np.random.Generator(np.random.Philox([draw.seed, step, draw.kind]))
    count = draw.rows * world_size()
    if draw.kind == BETA:
        drawn = numbers.beta(draw.alpha, draw.alpha, count).astype(np.float32)
    else:
        drawn = numbers.random(count, dtype=np.float32)
    local = torch.from_numpy(np.ascontiguousarray(drawn[rank() :: world_size()]))
    # Pinned, so the copy does not wait for the device's queue.
    return local.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else local


_source: Callable[[Draw, int, torch.device], Tensor] = _draw


class StaticDraws:
    """The random numbers of a step in tensors of fixed addresses, for a CUDA graph of the step."""

    def __init__(self) -> None:
        self._drawn: list[tuple[Draw, Tensor]] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, a step draws as usual; its draws replace those recorded before."""
        self._drawn = []

        def draw_and_record(draw: Draw, step: int, device: torch.device) -> Tensor:
            self._drawn.append((draw, _draw(draw, step, device)))
            return self._drawn[-1][1]

        with _use_source(draw_and_record):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, the draws of a step return the recorded tensors, in the recorded order."""
        recorded = iter(self._drawn)

        def next_recorded(draw: Draw, step: int, device: torch.device) -> Tensor:
            expected, numbers = next(recorded)
            if draw != expected:
                raise AssertionError(f"a step drew {draw} where {expected} was recorded")
            return numbers

        with _use_source(next_recorded):
            yield

    def fill(self, step: int) -> None:
        """Overwrites the recorded tensors with the numbers of another step."""
        for draw, numbers in self._drawn:
            numbers.copy_(_draw(draw, step, numbers.device))


@contextmanager
def _use_source(source: Callable[[Draw, int, torch.device], Tensor]) -> Iterator[None]:
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


class RngState(NamedTuple):
    """The state of the generators that dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None


def rng_state(device: torch.device) -> RngState:
    """The present state. PyTorch keeps CUDA's on the host, so this does not synchronize."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RngState(torch.get_rng_state(), cuda)


@contextmanager
def replay_rng(state: RngState, device: torch.device) -> Iterator[None]:
    """Inside, dropout draws what it drew after `state`; on leaving, the generators are restored."""
    present = rng_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(present, device)


class DropoutMaskDtype(TorchFunctionMode):
    """Inside, dropout masks of all tensors are those of tensors of another dtype.

    On a GPU one thread draws for eight 16-bit or four 32-bit elements, so the same generator state
    gives another mask for a float32 tensor than for a bfloat16 one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        kept = F.dropout(torch.ones_like(input, dtype=self._dtype), p) != 0
        return input * kept / (1.0 - p)


def _set(state: RngState, device: torch.device) -> None:
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)


def seed_run(config: RunConfig, dist_env: DistEnv) -> None:
    """Sets TF32, deterministic algorithms and this rank's generator as configured."""
    torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cudnn.allow_tf32
    ) = not config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if config.compile != "off":
            compilation.disable_timing_choices()
    torch.manual_seed(config.seed * 1_000_003 + dist_env.rank + 1)  # dropout differs between ranks


def seed_step(config: RunConfig, dist_env: DistEnv, step: int) -> None:
    """Seeds this rank's generator for a run that continues after `step` on other ranks."""
    numbers = np.random.SeedSequence([config.seed, step, dist_env.rank])
    torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> 1))


def generator_states() -> dict[str, Any]:
    """The states of all generators that training draws from on this rank, but for DALI's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_generators(saved: dict[str, Any]) -> None:
    """Restores what `generator_states` returned."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
