"""The tails of one network: compared with the first one, counted, timed in turns, as rows."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tools.bench.clock import interleaved, ratio, spread
from tools.bench.report import Row
from tools.bench.traffic import launches, traffic
from tools.bench_tails.contestants import HAND_OVER, PER_TENSOR, Tail, Work, contestants
from tools.bench_tails.problem import Problem, furthest, values

FACTORS = (1.0, 0.1, 1.0)  # of the gradients in the steps compared: clipped, not clipped, clipped
MOST_OFF = 1e-5
Build = Callable[[Problem], Tail]


class Outcome(NamedTuple):
    """Rows, and why contestants are missing or wrong."""

    rows: list[Row]
    failed: dict[str, str]


def measure(
    problem: Problem, *, steps: int, rounds: int, seed: int, bytes_per_second: float, seconds: float
) -> Outcome:
    """Of one network; after `seconds` no further round begins."""
    tails, failed = ready(problem, contestants(problem.device))
    times = interleaved(
        {name: _repeated(tail.work, steps) for name, tail in tails.items()},
        rounds=rounds,
        seed=seed,
        seconds=seconds,
    )
    least = problem.minimal_bytes()
    rows: list[Row] = []
    for name, tail in tails.items():
        rows += _time_rows(problem, name, times, steps, least / bytes_per_second)
        rows += _count_rows(problem, name, tail, least)
    return Outcome(rows, {f"{problem.name}: {name}": why for name, why in failed.items()})


def ready(
    problem: Problem, builders: Mapping[str, Build]
) -> tuple[dict[str, Tail], dict[str, str]]:
    """Tails that end at the weights and averages of the plain one; why the others are left out."""
    tails = {HAND_OVER: builders[HAND_OVER](problem)}
    failed: dict[str, str] = {}
    right = stepped(problem, builders[PER_TENSOR])
    for name, build in builders.items():
        if name == HAND_OVER:
            continue
        try:
            tail = stepped(problem, build)
            if wrong := difference(tail, right):
                failed[name] = wrong
            else:
                tails[name] = tail
        except Exception as error:  # an extension's, or that memory is full: the others go on
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return tails, failed


def stepped(problem: Problem, build: Build) -> Tail:
    """A tail after the steps that are compared."""
    tail = build(problem)
    for factor in FACTORS:
        tail.load(problem.gradients, factor)
        tail.work()
    return tail


def difference(mine: Tail, right: Tail) -> str:
    """What is off; empty if nothing is."""
    for what, a, b in (
        ("weights", values(mine.network), values(right.network)),
        ("averages", values(mine.average), values(right.average)),
    ):
        off = furthest(a, b)
        if not off <= MOST_OFF:  # also for NaN
            return f"wrong: its {what} are off by {off:.3g}"
    return ""


def _repeated(work: Work, steps: int) -> Work:
    def repeated() -> None:
        for _ in range(steps):
            work()

    return repeated


def _time_rows(
    problem: Problem, name: str, times: Mapping[str, list[float]], steps: int, limit: float
) -> list[Row]:
    label = f"{problem.name}: {name}"
    milliseconds = spread([1e3 * t / steps for t in times[name]])
    if name == HAND_OVER:
        return [Row(label, milliseconds, "ms")]
    rows = [Row(label, milliseconds, "ms", limit=1e3 * limit)]
    if name != PER_TENSOR and PER_TENSOR in times:
        gain = ratio(times, PER_TENSOR, name)
        rows.append(Row(f"{label} / {PER_TENSOR}", gain, "times", "higher", steady=True))
    return rows


def _count_rows(problem: Problem, name: str, tail: Tail, least: int) -> list[Row]:
    """No bytes where an extension moves some that cannot be seen."""
    if name == HAND_OVER:
        return []
    label, found = f"{problem.name}: {name}", traffic(tail.work)
    rows = []
    if "apex" not in name:
        moved = spread([found.bytes / 1e6])
        rows.append(Row(f"{label}, operators", spread([found.calls]), "calls", steady=True))
        rows.append(Row(f"{label}, memory", moved, "MB", steady=True, limit=least / 1e6))
    if problem.device.type == "cuda":
        launched = spread([launches(tail.work)])
        rows.append(Row(f"{label}, launches", launched, "launches", steady=True))
    return rows
