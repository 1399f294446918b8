"""What a run that does not fit a card can change until it does."""

from collections.abc import Callable, Iterator
from typing import Any

from mpl_fast.config import MPLConfig, RunConfig, problems
from mpl_fast.config.fields import replaced
from mpl_fast.errors import ConfigError

MOST = 64  # parts of a batch, and times the ranks


def remedies(
    config: RunConfig, ranks: int, memory: Callable[[RunConfig, int], float], have: int
) -> tuple[str, ...]:
    """Options, and numbers of ranks, with which `memory` is at most `have` bytes: of each kind the
    smallest change. `memory` raises `ConfigError` for a config that cannot be trained."""
    for changes in _options(config):
        changed = replaced(config, changes)
        size = _size(changed, ranks, memory)
        if size is not None and size <= have:
            given = " ".join(f"--{key} {value}" for key, value in changes.items())
            found = [f"{given} takes {size / 1e9:.3g} GB"]
            break
    else:
        found = []
    for times in _powers():
        size = _size(config, times * ranks, memory)
        if size is not None and size <= have:
            return (*found, f"{times * ranks} ranks take {size / 1e9:.3g} GB each")
    return tuple(found)


def _options(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes that keep the batch, from the cheapest on."""
    again: dict[str, Any] = {}
    if isinstance(config.algorithm, MPLConfig) and config.algorithm.teacher_graph == "hold":
        again = {"algorithm.teacher_graph": "recompute"}
        yield again
    for parts in _powers():
        yield {**again, "microbatches": parts * config.microbatches}


def _powers() -> Iterator[int]:
    number = 2
    while number <= MOST:
        yield number
        number *= 2


def _size(config: RunConfig, ranks: int, memory: Callable[[RunConfig, int], float]) -> float | None:
    """Bytes; None for a config that cannot be trained."""
    theirs = [line for line in problems(config) if not line.startswith(("run_dir", "data.root"))]
    try:
        return None if theirs else memory(config, ranks)
    except ConfigError:
        return None
