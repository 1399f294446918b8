"""The cells of the grid: every contestant at a shape, measured side by side; and the order."""

import random
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch

from tools.bench_losses import capture, clock, contestants, correctness
from tools.bench_losses.contestants import AUTOTUNED, SYNCHRONIZING, Call
from tools.bench_losses.correctness import Case, line
from tools.bench_losses.problems import LOSSES, Inputs, Shape
from tools.bench_losses.progress import Progress

Json = dict[str, Any]
IMAGENET, IMAGENET_21K, ODD = (1000, 1000), (21841, 21888), (21841, 21841)  # classes, width
BATCHES = (256, 1024, 4096, 32768)
BF16, FP32 = torch.bfloat16, torch.float32
WALL_ROUNDS = 5
DEVICE = "cuda"
# What the goals are about; everything else follows.
GOALS = [
    Shape("teacher", *IMAGENET, 32768, BF16),
    Shape("teacher", *IMAGENET_21K, 4096, BF16),
    Shape("teacher", *IMAGENET, 256, BF16),
    Shape("teacher", *IMAGENET, 1024, BF16),
]
NEXT = [
    Shape("student", *IMAGENET, 256, BF16),
    Shape("pseudo", *IMAGENET, 256, BF16),
    Shape("student", *IMAGENET, 32768, BF16),
    Shape("student", *IMAGENET_21K, 4096, BF16),
]


def rest() -> list[list[Shape]]:
    """All other shapes: of each type the teacher's and the student's, then the two small ones."""
    classes: list[list[Shape]] = []
    for dtype, losses in product((BF16, FP32), (LOSSES[:2], LOSSES[2:])):
        grid = product(losses, (IMAGENET, IMAGENET_21K, ODD), BATCHES)
        shapes = [Shape(loss, *head, batch, dtype) for loss, head, batch in grid]
        classes.append([s for s in shapes if _fits(s) and s not in GOALS + NEXT])
    return classes


def _fits(shape: Shape) -> bool:
    small = shape.width == IMAGENET[1] or shape.batch <= 4096
    return small and (shape.dtype == BF16 or shape.batch == 4096)


def entrants(shape: Shape) -> list[str]:
    """Who is measured: auto-tuning takes its time, and is left to the shapes of the goals."""
    everybody = contestants.names(shape)
    return everybody if shape in GOALS + NEXT else [n for n in everybody if n != AUTOTUNED]


class Runner(NamedTuple):
    """A contestant that is right, ready to be timed."""

    cell: Json
    name: str
    call: Call
    graph: torch.cuda.CUDAGraph | None


def measure(shape: Shape, who: Sequence[str], progress: Progress, order: random.Random) -> None:
    """Adds a cell for each contestant: `failed`, `wrong` and `not_capturable` say why there are no
    numbers.

    Raises DeviceLostError if the device does not survive one of them.
    """
    contestants.clear()
    torch.cuda.empty_cache()
    sets: list[Inputs] = []
    case: Case | None = None
    runners: list[Runner] = []
    # Who synchronizes comes last, and alone.
    for name in sorted(who, key=lambda name: name in SYNCHRONIZING):
        if not progress.allows(f"{shape}, {name}", name):
            continue
        if name in SYNCHRONIZING:
            _in_turns(runners, sets, order)
            runners = []
        cell = _new_cell(shape, name)
        progress.result["cells"].append(cell)
        with progress.timed(name):
            try:
                case = case or correctness.case(shape, DEVICE)
                sets = sets or clock.input_sets(shape)
                if runner := _prepared(cell, name, case, sets, progress.result["correctness"]):
                    runners.append(runner)
            except Exception as error:  # the other contestants' numbers are worth having
                cell["failed"] = line(error)
        if "failed" in cell or "not_capturable" in cell:
            capture.require_device()
    with progress.timed("rounds"):
        _in_turns(runners, sets, order)


def _new_cell(shape: Shape, name: str) -> Json:
    return {
        **shape._asdict(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rows": shape.rows,
        "contestant": name,
        "minimal_bytes": shape.minimal_bytes,
    }


def _prepared(
    cell: Json, name: str, case: Case, sets: list[Inputs], checked: list[Json]
) -> Runner | None:
    """Checked, warm, counted and, if that can be, captured; None if it is wrong."""
    mine = [r for r in checked if (r["contestant"], r["loss"]) == (name, case.shape.loss)]
    if faults := [f"{r['shape']}: {r['wrong']}" for r in mine if r["wrong"]]:
        cell["wrong"] = faults[0]
        return None
    call = contestants.build(name, case.shape)
    cell["error"] = correctness.compare(case, call, name, DEVICE)
    if cell["error"]["wrong"]:
        cell["wrong"] = cell["error"]["wrong"]
        return None
    clock.warm_up(call, sets)
    cell["launches"] = clock.launches(call, sets[0])
    cell["extra_bytes"] = clock.extra_memory(call, sets[0])
    cell["input_sets"] = len(sets)
    why = "it synchronizes" if name in SYNCHRONIZING else ""
    why = why or capture.synchronization(lambda: call(sets[0]))
    graph = None
    if not why:
        try:
            graph = clock.graph_of(call, sets)
        except Exception as error:
            why = line(error)
    if why:
        cell["not_capturable"] = why
    return Runner(cell, name, call, graph)


def _in_turns(runners: list[Runner], sets: list[Inputs], order: random.Random) -> None:
    """Times all of them; what fails here fails for all."""
    try:
        _time(runners, sets, order)
    except Exception as error:
        for runner in runners:
            runner.cell["failed"] = line(error)
        capture.require_device()


def _time(runners: list[Runner], sets: list[Inputs], order: random.Random) -> None:
    """Graph replays of all in turns, then Python's calls of all in turns."""
    graphs = [(r.cell, r.graph) for r in runners if r.graph]
    found = clock.interleaved([graph.replay for _, graph in graphs], order)
    for (cell, _), microseconds in zip(graphs, found, strict=True):
        times = clock.summary(microseconds, len(sets))
        cell["graph_us"] = times._asdict()
        cell["gb_per_s"] = cell["minimal_bytes"] / times.median / 1e3
    walls: list[list[float]] = [[] for _ in runners]
    for _ in range(WALL_ROUNDS):
        for turn in order.sample(range(len(runners)), len(runners)):
            walls[turn].append(clock.wall(runners[turn].call, sets))
    for runner, times_of in zip(runners, walls, strict=True):
        runner.cell["wall_us"] = median(times_of)
