"""Measures the fused losses beside plain PyTorch, torch.compile and Liger on a GPU.

Every variant is compared with float64 at a few shapes, and again at each shape where it is timed; a
wrong one is reported and not timed. The most important shapes come first, as many as `--minutes`
allow. Times are those of CUDA graphs over rotating inputs, larger than the cache; the limit is a
copy's speed in the same run. Without a GPU, `--smoke` counts launches and bytes on the CPU, our
kernels on Triton's interpreter, and times nothing.
"""

import argparse
import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from tools.bench import count
from tools.bench.clock import interleaved, seconds_of, wait_for_gpu
from tools.bench.cuda_graph import captured, require_device, synchronization
from tools.bench.harness import Report, run
from tools.bench.losses_variants import (
    COMPILED,
    EAGER,
    LIGER,
    LOSSES,
    OURS,
    PLAIN,
    TEMPERATURE,
    THRESHOLD,
    Call,
    Inputs,
    Outputs,
    Shape,
    build,
    definition,
    draw,
    names,
)
from tools.bench.machine import copies
from tools.bench.results import Row, count_row, one_line, ratios, spread

TINY: dict[str, object] = {}
BF16, FP32 = torch.bfloat16, torch.float32
CHECKED = [(10, FP32), (1000, BF16), (1000, torch.float16), (8192, FP32), (21841, BF16)]
CHECKED_ON_CPU = [(100, FP32), (1000, BF16)]
CHECKED_BATCH = 40
STATISTIC = 2e-6  # relative, or absolute below 1; float32 sums
ROUNDING = 1.05  # times the error of rounding the float64 gradient to the logits' type
FLOAT32 = 1e-6  # relative to the gradient's norm
BORDER = 1e-5  # a confidence so close to the threshold may fall to either side
CACHES = 4  # the inputs of a replay are so many times larger than the L2 cache
FEWEST, MOST = 3, 200  # sets of inputs
FLUSHED = 256 * 2**20  # bytes written before each timing: no cache, no wait for the host
HOST_CALLS, HOST_ROUNDS = 10, 5
GPU = "cuda"
SHORTEST = 10.0  # seconds in which no shape is done
# What the goals are about; then the small losses and the student's.
SHAPES = [
    Shape("teacher", *size, BF16)
    for size in ((1000, 32768), (21841, 4096), (1000, 256), (1000, 1024))
]
SHAPES += [Shape(loss, 1000, 256, BF16) for loss in LOSSES[1:]]
SHAPES += [Shape("student", *size, BF16) for size in ((1000, 32768), (21841, 4096))]


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("losses", __doc__, arguments, measure, options, rounds=30, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """None beside those of every benchmark."""


def measure(options: argparse.Namespace, report: Report) -> None:
    """Correctness first; then times on a GPU, or counts on a CPU."""
    report.more["correctness"] = []
    if torch.cuda.is_available():
        _on_gpu(options, report)
    elif options.smoke:
        # Decided when a kernel is decorated, so before this project's kernels are imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        _on_cpu(report)
    else:
        raise ConfigError("there is no CUDA device; --smoke runs without one")


class Case(NamedTuple):
    """Inputs, and what the definition makes of them in float64."""

    shape: Shape
    seed: int
    inputs: Inputs
    expected: Outputs


class Errors(NamedTuple):
    """The largest errors of a variant, and what is too large; empty if nothing is."""

    statistics: float
    gradient: float
    wrong: str


def case_of(shape: Shape, device: str) -> Case:
    """A new draw each time; its seed is kept, so that it can be repeated."""
    for _ in range(10):
        seed = torch.seed() % 2**31
        x = draw(shape, device, torch.Generator(device).manual_seed(seed))
        if not _at_the_border(shape, x):
            break
    wide = x._replace(logits=x.logits.detach().double().requires_grad_())
    return Case(shape, seed, x, definition(shape)(wide))


def compare(one: Case, call: Call, device: str, *, rough: bool = False) -> Errors:
    """`rough`: the variant may round its losses to the logits' type."""
    moved = Inputs(*(tensor.detach().to(device, copy=True) for tensor in one.inputs))
    moved.logits.requires_grad_()
    if moved.logits.is_cuda:
        _fill_memory_with_nan(one.shape)
    got, expected = call(moved), one.expected
    allowed = STATISTIC + (2 * torch.finfo(one.shape.dtype).eps if rough else 0.0)
    wrong, worst, off = [], 0.0, 0.0
    for field, value in got.out._asdict().items():
        truth = getattr(expected.out, field).detach()
        value = value.detach().to(truth.device)
        if value.dtype == torch.int64:
            if not torch.equal(value, truth):
                wrong.append(f"{field} differs")
            continue
        error = float(((value.double() - truth).abs() / truth.abs().clamp_min(1.0)).max())
        worst = max(worst, error)
        if not error <= allowed:
            wrong.append(f"{field} is off by {error:.1e}")
    if got.gradient is not None and expected.gradient is not None:
        truth = expected.gradient
        off = _distance(got.gradient.detach().to(truth.device).double(), truth)
        rounding = _distance(truth.to(one.shape.dtype).double(), truth)
        if not off <= (2.0 if rough else ROUNDING) * rounding + FLOAT32:  # also true of NaN
            wrong.append(f"the gradient is off by {off:.1e}, rounding alone by {rounding:.1e}")
    return Errors(worst, off, "; ".join(wrong))


def check(
    shapes: Sequence[tuple[int, torch.dtype]],
    variants: Sequence[str],
    device: str,
    report: Report,
) -> set[tuple[str, str]]:
    """Compares every variant at every shape and loss; returns those that are wrong, by loss.

    float64 is the CPU's, so that a fault of the GPU cannot hide.
    """
    faulty = set()
    for (classes, dtype), loss in product(shapes, LOSSES):
        one = case_of(Shape(loss, classes, CHECKED_BATCH, dtype), "cpu")
        for name in variants:
            if name not in names(one.shape):
                continue
            try:
                errors = compare(one, build(name, one.shape), device)
            except Exception as error:
                errors = Errors(math.nan, math.nan, one_line(error))
            if _noted(name, one, errors, report):
                faulty.add((name, loss))
    return faulty


def _noted(name: str, one: Case, errors: Errors, report: Report) -> bool:
    """Whether the variant is wrong, which fails the run."""
    numbers = {k: v if v == v else str(v) for k, v in errors._asdict().items()}  # JSON has no NaN
    found = {"shape": str(one.shape), "variant": name, "seed": one.seed}
    report.more["correctness"].append(found | numbers)
    if errors.wrong:
        report.fail(f"{one.shape}, {name}", errors.wrong)
    return bool(errors.wrong)


def _on_cpu(report: Report) -> None:
    """Launches and bytes of plain PyTorch; our kernels on Triton's interpreter."""
    report.claim = "launches and bytes, counted on a CPU: nothing was timed"
    # Small, since the interpreter is slow; float32, since it truncates to bfloat16.
    check(CHECKED_ON_CPU, [PLAIN, EAGER], "cpu", report)
    check([(100, FP32)], OURS, "cpu", report)
    for loss in LOSSES:
        large, small = Shape(loss, 1000, 256, BF16), Shape(loss, 100, 16, FP32)
        for name in (PLAIN, EAGER):
            _counts(large, name, report)
        for name in [one for one in OURS if one in names(small)]:
            _counts(small, name, report)
    report.skipped += [f"{name}: needs a GPU" for name in (COMPILED, LIGER)]


def _counts(shape: Shape, name: str, report: Report) -> None:
    """Launches of our kernels and of PyTorch's operators together; bytes where all can be seen."""
    call, x, label = build(name, shape), draw(shape, "cpu"), f"{shape}, {name}"
    with count.interpreted_kernels() as kernels:
        counts = count.operators(lambda: call(x))
    report.add([count_row(f"{label}, launches", counts.launches + len(kernels), "launches")])
    if name in OURS:
        report.more.setdefault("kernels", {})[label] = kernels
    else:
        least = shape.minimal_bytes / 1e6
        report.add([count_row(f"{label}, memory", counts.bytes / 1e6, "MB", limit=least)])


def _on_gpu(options: argparse.Namespace, report: Report) -> None:
    copied = copies(torch.device(GPU), small=options.smoke)
    report.more["limits"] = {"copy, bytes/s": copied._asdict()}
    report.claim = (
        "one call on the device, out of CUDA graphs over rotating inputs, median of "
        f"{options.rounds} interleaved rounds; the share of the limit is that of a copy"
    )
    faulty = check(CHECKED, (*OURS, PLAIN, EAGER), GPU, report)
    require_device()
    for shape in SHAPES[2:3] if options.smoke else SHAPES:
        if report.seconds_left() < SHORTEST:
            report.skipped.append(f"no time: {shape}")
            continue
        right = [n for n in names(shape) if (n, shape.loss) not in faulty]
        measure_shape(shape, right, copied.high, options, report)


class Ready(NamedTuple):
    """A correct variant: its call, its inputs, and its CUDA graph if it can be captured."""

    call: Call
    sets: list[Inputs]
    graph: torch.cuda.CUDAGraph | None


def measure_shape(
    shape: Shape,
    variants: Sequence[str],
    copy: float,
    options: argparse.Namespace,
    report: Report,
) -> None:
    """All variants at one shape, in turns. Raises DeviceLostError if the GPU is lost."""
    torch._dynamo.reset()  # or the ninth shape would silently run eagerly
    torch.cuda.empty_cache()
    one, sets = case_of(shape, GPU), input_sets(shape)
    ready: dict[str, Ready] = {}
    for name in variants:
        _prepare(name, one, sets, ready, report)
    graphs = {name: one.graph for name, one in ready.items() if one.graph is not None}
    turns = {"rounds": options.rounds, "warmup": 3, "seed": options.seed}
    replays = interleaved(graphs, _replay_us, **turns)
    device = {name: [us / len(sets) for us in found] for name, found in replays.items()}
    turns |= {"rounds": min(HOST_ROUNDS, options.rounds), "warmup": 1}
    host = interleaved(ready, _host_us, **turns)
    report.add(rows(shape, device, host, copy))


def _prepare(
    name: str, one: Case, sets: list[Inputs], ready: dict[str, Ready], report: Report
) -> None:
    """Compared, warm, counted and, if that can be, captured."""
    label = f"{one.shape}, {name}"
    try:
        call = build(name, one.shape)
        if _noted(name, one, compare(one, call, GPU, rough=name == LIGER), report):
            return
        if name == LIGER:  # it overwrites its inputs
            sets = input_sets(one.shape)
        _warm_up(call, sets)
        launched = count.launches(lambda: call(sets[0]))
        extra = count.extra_memory(lambda: call(sets[0]))
        report.add(
            [
                count_row(f"{label}, launches", launched, "launches"),
                count_row(f"{label}, extra memory", extra / 1e6, "MB"),
            ]
        )
        ready[name] = Ready(call, sets, _graph(label, call, sets, report))
    except Exception as error:  # the other variants' numbers are worth having
        report.skipped.append(f"failed: {label}: {one_line(error)}")
        require_device()


def rows(
    shape: Shape,
    device: dict[str, list[float]],
    host: dict[str, list[float]],
    copy: float,
) -> list[Row]:
    """Microseconds, and how many times faster than torch.compile and than plain PyTorch."""
    made, limit = [], 1e6 * shape.minimal_bytes / copy
    for name, found in device.items():
        made.append(Row(f"{shape}, {name}", spread(found), "us", limit=limit))
        for base in (COMPILED, PLAIN):
            if base in device and base != name:
                gain = ratios(device, base, name)
                made.append(Row(f"{shape}, {base} / {name}", gain, "x", "higher", steady=True))
    made += [Row(f"{shape}, {name}, host", spread(found), "us") for name, found in host.items()]
    return made


def input_sets(shape: Shape) -> list[Inputs]:
    """Arguments so many and large that none is in the cache when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [draw(shape, GPU) for _ in range(set_count(shape.logit_bytes, l2))]


def set_count(logit_bytes: int, l2_bytes: int) -> int:
    """Several times the cache, if that many are not too many."""
    return min(MOST, max(FEWEST, math.ceil(CACHES * l2_bytes / logit_bytes) + 1))


def _graph(
    label: str, call: Call, sets: list[Inputs], report: Report
) -> torch.cuda.CUDAGraph | None:
    """One call for each set; gradients are kept till its end, so they rotate as well."""
    kept: list[Tensor | None] = []
    why = synchronization(lambda: call(sets[0]))
    if not why:
        try:
            return captured(lambda: kept.extend(call(x).gradient for x in sets))
        except Exception as error:
            why = one_line(error)
            require_device()
    report.skipped.append(f"no CUDA graph: {label}: {why}")
    return None


def _warm_up(call: Call, sets: list[Inputs]) -> None:
    """Compiles, and fills the allocator's cache, on a stream of its own as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in sets[:3]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    wait_for_gpu()


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds on the device of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _memory_to_flush().zero_()  # the host has queued everything before this ends
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _host_us(ready: Ready) -> float:
    """Microseconds of a call made by Python, back to back with others."""

    def calls() -> None:
        for number in range(HOST_CALLS):
            ready.call(ready.sets[number % len(ready.sets)])

    return 1e6 * seconds_of(calls) / HOST_CALLS


@cache
def _memory_to_flush() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def _at_the_border(shape: Shape, x: Inputs) -> bool:
    """Whether rounding decides if some confidence reaches the threshold."""
    if shape.loss != "teacher":
        return False
    weak = x.logits.detach()[shape.labeled : shape.labeled + shape.batch]
    confidence = (weak.double() / TEMPERATURE).softmax(-1).amax(-1)
    return bool(((confidence - THRESHOLD).abs() < BORDER).any())


def _distance(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _fill_memory_with_nan(shape: Shape) -> None:
    """Leaves NaN in the memory that the allocator reuses: what is unwritten shows."""
    blocks = [torch.full((shape.rows, shape.classes), torch.nan, device="cuda", dtype=shape.dtype)]
    blocks += [torch.full((2**n,), torch.nan, device="cuda") for n in range(4, 16)]
    del blocks
