"""One recipe measured: contestants are built while there is time, then take turns."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mpl_fast.learner.compilation import Mode
from tools.bench.clock import interleaved, seconds_of
from tools.bench_steps import contestants, correctness
from tools.bench_steps.contestants import Contestant, Flavor
from tools.bench_steps.phases import phases
from tools.bench_steps.setting import Setting, batch

Json = dict[str, Any]
WARM, PHASE_ROUNDS = 2, 3
WARM_ON_GPU = 6  # until a graph of a step is captured and replayed; alike for all, to be compared
AT_LEAST, AT_MOST = 0.2, 20  # seconds of a turn, and steps in it
# Of the time: no contestant is begun later than this, nor if one like the slowest so far would not
# be ready by that, so that something is measured.
BUILDING, BUILT = 0.6, 0.8


class Found(NamedTuple):
    """What was measured of a recipe."""

    seconds: dict[str, list[float]]  # of a step, in each round
    phases: dict[str, dict[str, list[float]]]
    memory: dict[str, int]  # bytes of the GPU at a step's peak
    checked: list[Json]
    skipped: list[str]


class Ready(NamedTuple):
    """A contestant that has run."""

    one: Contestant
    once: float  # seconds of a warm step
    memory: int
    told: dict[str, float]  # by the last step that warmed it up


def measure(
    setting: Setting,
    recipe: str,
    wanted: Callable[[str], bool],
    *,
    rounds: int,
    seed: int,
    seconds: float,
    compiled: Mode = "default",
) -> Found:
    """Everybody whose name is `wanted`, as far as `seconds` allow."""
    began = time.perf_counter()
    who = entrants(setting, recipe, compiled)
    ready, skipped = _build(who, wanted, began + BUILDING * seconds, began + BUILT * seconds)
    fallen = set[str]()
    works = {one.one.name: _turn(one, fallen) for one in ready}
    left = seconds - (time.perf_counter() - began)
    found = interleaved(works, rounds=rounds, warmup=1, seed=seed, seconds=0.8 * left)
    ready = [one for one in ready if one.one.name not in fallen]
    skipped += [f"failed: {name}: out of memory beside the others" for name in sorted(fallen)]
    in_time = time.perf_counter() - began < seconds
    if not in_time:
        skipped.append("no time: phases")
    return Found(
        {one.one.name: [s / _repeats(one.once) for s in found[one.one.name]] for one in ready},
        {one.one.name: _phases(one.one) for one in ready if in_time and _has_phases(one.one)},
        {one.one.name: one.memory for one in ready if one.memory},
        _checked(ready, setting, recipe),
        skipped,
    )


def entrants(
    setting: Setting, recipe: str, compiled: Mode
) -> Iterable[tuple[str, Callable[[], Contestant | None]]]:
    """Names and how they are built, the most important first."""
    made: list[tuple[str, Callable[[], Contestant | None]]] = []
    if recipe == "mpl":
        made.append((contestants.PLAIN_AMP, lambda: contestants.plain(setting, True)))
        made.append((contestants.PLAIN, lambda: contestants.plain(setting, False)))
    for alike in contestants.flavors(setting, compiled):
        made += [(flavor.name, _builder(setting, recipe, flavor)) for flavor in alike]
        # What these steps are compared with.
        made.append((f"one pass {alike[0].how}", _pass_builder(setting, alike[0])))
    return made


def _builder(setting: Setting, recipe: str, flavor: Flavor) -> Callable[[], Contestant | None]:
    return lambda: contestants.ours(setting, recipe, flavor)


def _pass_builder(setting: Setting, flavor: Flavor) -> Callable[[], Contestant | None]:
    return lambda: contestants.one_pass(setting, flavor)


def _build(
    who: Iterable[tuple[str, Callable[[], Contestant | None]]],
    wanted: Callable[[str], bool],
    last: float,
    done: float,
) -> tuple[list[Ready], list[str]]:
    """Whoever runs; one that fails, for want of memory or of a compiler, is told and left out.

    None is begun after `last`, or if it would not be ready by `done`.
    """
    ready, skipped, slowest = list[Ready](), list[str](), 0.0
    for name, build in filter(lambda one: wanted(one[0]), who):
        began = time.perf_counter()
        if ready and (began > last or began + slowest > done):
            skipped.append(f"no time: {name}")
            continue
        print(f"building {name}", flush=True)
        try:
            one = _warmed(build)
        except Exception as error:
            skipped.append(f"failed: {name}: {type(error).__name__}: {_first_line(error)}")
            one = None
        if one is not None:
            ready.append(one)
        _free()
        slowest = max(slowest, time.perf_counter() - began)
    return ready, skipped


def _warmed(build: Callable[[], Contestant | None]) -> Ready | None:
    """Runs it: compilers, libraries and the allocator's cache are then warm."""
    gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if gpu else 0
    one = build()
    if one is None:
        return None
    told: Mapping[str, Any] = {}
    for _ in range(WARM_ON_GPU if gpu else WARM):
        told = one.step()
    numbers = {name: float(value) for name, value in told.items()}
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    once = seconds_of(one.step)
    # What lies in a graph's own pool is not among what is allocated.
    graphed = one.flavor is not None and one.flavor.graphs != "off"
    memory = torch.cuda.max_memory_allocated() - before if gpu and not graphed else 0
    return Ready(one, once, memory, numbers)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _repeats(once: float) -> int:
    """Steps back to back in a turn: a wait for the GPU after each would be part of the number."""
    return min(AT_MOST, max(1, round(AT_LEAST / once)))


def _turn(ready: Ready, fallen: set[str]) -> Callable[[], None]:
    """A few steps; who runs out of memory is noted in `fallen` and does nothing any more."""
    (name, step, *_), repeats = ready.one, _repeats(ready.once)

    def turn() -> None:
        if name in fallen:
            return
        try:
            for _ in range(repeats):
                step()
        except torch.OutOfMemoryError:
            fallen.add(name)
        if name in fallen:  # here, where the error holds no tensors any more
            _free()

    return turn


def _has_phases(one: Contestant) -> bool:
    """A graph of a whole step calls none of its methods."""
    return bool(one.owners) and not (one.flavor and one.flavor.graphs == "step")


def _phases(one: Contestant) -> dict[str, list[float]]:
    """After the timing, since it waits for the device again and again."""
    turns = [phases(one.step, one.owners) for _ in range(PHASE_ROUNDS + 1)][1:]
    return {name: [turn.get(name, 0.0) for turn in turns] for name in turns[0]}


def _checked(ready: Sequence[Ready], setting: Setting, recipe: str) -> list[Json]:
    images = batch(setting, recipe).labeled
    told = {one.one.flavor: one.told for one in ready if one.one.flavor is not None}
    rows = correctness.same_losses(told, setting.device)
    for one in ready:
        flavor = one.one.flavor
        if flavor is not None:
            dtype = torch.bfloat16 if flavor.bf16 else torch.float32
            rows += correctness.logits(one.one, images.to(dtype))
    return rows


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
