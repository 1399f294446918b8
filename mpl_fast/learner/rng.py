"""Random numbers that all ranks agree on, and forward passes whose dropout can be drawn again."""

import os
import random
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
    """A wish for random numbers, all but the step."""

    kind: int
    rows: int  # for this rank
    alpha: float
    seed: int


def uniform(count: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """This rank's ``(count,)`` float32 numbers in [0, 1), the same on a CPU and on a GPU.

    All ranks draw for the whole batch and each keeps every world-th row, so that they have together
    what one would have alone; a function of seed and step, so there is nothing to resume.
    """
    return _source(Draw(UNIFORM, count, 0.0, seed), step, device)


def beta(count: int, alpha: float, *, seed: int, step: int, device: torch.device) -> Tensor:
    """This rank's ``(count,)`` float32 draws from Beta(alpha, alpha), shared out like `uniform`."""
    return _source(Draw(BETA, count, alpha, seed), step, device)


def _fresh(draw: Draw, step: int, device: torch.device) -> Tensor:
    numbers = np.random.Generator(np.random.Philox([draw.seed, step, draw.kind]))
    count = draw.rows * world_size()
    if draw.kind == BETA:
        found = numbers.beta(draw.alpha, draw.alpha, count).astype(np.float32)
    else:
        found = numbers.random(count, dtype=np.float32)
    mine = torch.from_numpy(np.ascontiguousarray(found[rank() :: world_size()]))
    # Pinned, so that the copy does not wait for what the device is doing.
    return mine.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else mine


_source: Callable[[Draw, int, torch.device], Tensor] = _fresh


class StaticDraws:
    """The random numbers of a step in tensors that stay where they are, for a CUDA graph of it."""

    def __init__(self) -> None:
        self._drawn: list[tuple[Draw, Tensor]] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, a step draws as ever, and this remembers what; anew each time."""
        self._drawn = []

        def noted(draw: Draw, step: int, device: torch.device) -> Tensor:
            self._drawn.append((draw, _fresh(draw, step, device)))
            return self._drawn[-1][1]

        with _drawing(noted):
            yield

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, a step that draws the same in the same order is given those tensors."""
        turn = iter(self._drawn)

        def known(draw: Draw, step: int, device: torch.device) -> Tensor:
            expected, numbers = next(turn)
            if draw != expected:
                raise AssertionError(f"a step drew {draw} where it had drawn {expected}")
            return numbers

        with _drawing(known):
            yield

    def fill(self, step: int) -> None:
        """Puts the numbers of another step into them."""
        for draw, numbers in self._drawn:
            numbers.copy_(_fresh(draw, step, numbers.device))


@contextmanager
def _drawing(source: Callable[[Draw, int, torch.device], Tensor]) -> Iterator[None]:
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


class RngState(NamedTuple):
    """The state of the generators that a network's dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None


def rng_state(device: torch.device) -> RngState:
    """The present state; on CUDA it lives on the host, so nothing waits."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RngState(torch.get_rng_state(), cuda)


@contextmanager
def replay_rng(state: RngState, device: torch.device) -> Iterator[None]:
    """Inside, dropout draws what it drew after `state`; afterwards all is as before."""
    present = rng_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(present, device)


class DrawnAs(TorchFunctionMode):
    """Inside, dropout keeps what it would keep of numbers of another type.

    On a GPU one thread draws for eight 16-bit or four 32-bit numbers, so that the same state of the
    generator drops other elements of a float32 tensor than of a bfloat16 one.
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
    """Precision, determinism and this rank's random generator."""
    torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cudnn.allow_tf32
    ) = not config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if config.compile != "off":
            compilation.deterministic()
    torch.manual_seed(config.seed * 1_000_003 + dist_env.rank + 1)  # dropout differs between ranks


def generator_states() -> dict[str, Any]:
    """Of every generator that training draws from on this rank (DALI keeps its own)."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore_generators(saved: dict[str, Any]) -> None:
    """Sets the generators to what `generator_states` returned."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    random.setstate(saved["python"])
