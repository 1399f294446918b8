"""Measures the fused losses beside plain PyTorch, torch.compile and Liger on a GPU.

At each shape every variant is compared with float64; a wrong one is reported and not timed. The
most important shapes come first, as many as `--minutes` allow. Times are those of CUDA graphs over
rotating inputs, larger than the cache; the limit is a copy's speed in the same run. Without a GPU,
`--smoke` compares plain PyTorch and the definition, counts their launches and bytes on the CPU, and
times nothing.
"""

import argparse
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.testing import assert_close

from mpl_fast import losses
from mpl_fast.errors import ConfigError
from tools.bench import count
from tools.bench.clock import Work, interleaved, repeated, seconds_of
from tools.bench.harness import DeviceLostError, Report, run
from tools.bench.limits import COPY
from tools.bench.losses_variants import (
    COMPILED,
    EAGER,
    LIGER,
    LOSSES,
    OURS,
    PLAIN,
    Call,
    Inputs,
    Shape,
    build,
    draw,
    names,
)
from tools.bench.results import Row, count_row, one_line, ratios, spread

TINY = {"rounds": 1}
BF16 = torch.bfloat16
STATISTIC = 2e-6  # relative, or absolute below 1; float32 sums
GRADIENT = 1e-6  # of its largest element, beside the rounding to the logits' type
CACHES = 4  # the inputs that take turns are so many times larger than the L2 cache
FEWEST, MOST = 3, 200  # sets of inputs
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
    return run("losses", __doc__, arguments, measure, options, rounds=3, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """None beside those of every benchmark."""


def measure(options: argparse.Namespace, report: Report) -> None:
    """Times on a GPU, or counts on a CPU."""
    torch.manual_seed(options.seed)
    if torch.cuda.is_available():
        with losses.use("triton"):
            _on_gpu(options, report)
    elif options.smoke:
        _on_cpu(report)
    else:
        raise ConfigError("there is no CUDA device; --smoke runs without one")


def _on_cpu(report: Report) -> None:
    """Launches and bytes of PyTorch's operators."""
    report.claim = "launches and bytes, counted on a CPU: nothing was timed"
    for loss in LOSSES:
        shape = Shape(loss, 1000, 256, BF16)
        for name in (PLAIN, EAGER):
            label = f"{shape}, {name}"
            with report.attempt(label):
                work = partial(checked(name, shape, "cpu"), draw(shape, "cpu"))
                counts, least = count.operators(work), shape.minimal_bytes / 1e6
                memory = count_row(f"{label}, memory", counts.bytes / 1e6, "MB", limit=least)
                report.add([count_row(f"{label}, launches", counts.launches, "launches"), memory])
    report.skipped += [f"{name}: needs a GPU" for name in (*OURS, COMPILED, LIGER)]


def _on_gpu(options: argparse.Namespace, report: Report) -> None:
    report.claim = (
        f"one call on the device, out of CUDA graphs over rotating inputs, {options.rounds} "
        "interleaved rounds of 10 replays; the share of the limit is that of a copy"
    )
    for shape in SHAPES[2:3] if options.smoke else SHAPES:
        if report.seconds_left() < SHORTEST:
            report.skipped.append(f"no time: {shape}")
        else:
            _measure_shape(shape, report.limits.best(COPY), options, report)


def checked(name: str, shape: Shape, device: str) -> Call:
    """The variant, after one call. Raises AssertionError unless it computes the definition."""
    x, call = draw(shape, device), build(name, shape.loss)
    wide = x._replace(logits=x.logits.detach().double().requires_grad_())
    expected, got = build(EAGER, shape.loss)(wide), call(x)
    eps = torch.finfo(shape.dtype).eps
    allowed = STATISTIC + (2 * eps if name == LIGER else 0.0)  # Liger rounds its loss
    assert_close(got.out, expected.out, rtol=allowed, atol=allowed, check_dtype=False)
    if got.gradient is not None and expected.gradient is not None:
        assert_close(
            got.gradient.double(),
            expected.gradient,
            rtol=eps,
            atol=GRADIENT * float(expected.gradient.abs().max()),
            msg=lambda text: f"the gradient: {text}",
        )
    return call


def _measure_shape(shape: Shape, copy: float, options: argparse.Namespace, report: Report) -> None:
    """All variants at one shape, in turns."""
    torch._dynamo.reset()  # or the ninth shape would silently run eagerly
    torch.cuda.empty_cache()
    works, graphs = dict[str, Work](), dict[str, Work]()
    for name in names(shape.loss):
        label = f"{shape}, {name}"
        with report.attempt(label):
            work = rotating(checked(name, shape, GPU), input_sets(shape))
            work()
            memory = count_row(f"{label}, extra memory", count.extra_memory(work) / 1e6, "MB")
            launched = count.launches(work)
            report.add([count_row(f"{label}, launches", launched, "launches"), memory])
            works[name] = work
            if waits := count.host_syncs(work, torch.device(GPU)):
                report.skipped.append(f"no CUDA graph: {label}: it waits in {', '.join(waits)}")
            else:
                graphs[name] = work
    turns = interleaved(graphs, _device_us, rounds=options.rounds, warmup=0, seed=options.seed)
    device = {name: [us for turn in found for us in turn] for name, found in turns.items()}
    rounds = min(HOST_ROUNDS, options.rounds)
    host = interleaved(works, _host_us, rounds=rounds, warmup=1, seed=options.seed)
    report.add(rows(shape, device, host, copy))


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
    """Arguments so many and large that none is in the cache when its turn comes again.

    Each variant has its own, since Liger overwrites them.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [draw(shape, GPU) for _ in range(set_count(shape.logit_bytes, l2))]


def set_count(logit_bytes: int, l2_bytes: int) -> int:
    """Several times the cache, if that many are not too many."""
    return min(MOST, max(FEWEST, math.ceil(CACHES * l2_bytes / logit_bytes) + 1))


def rotating(call: Call, sets: list[Inputs]) -> Work:
    """A call with the next inputs; gradients are kept for a turn, so that they rotate as well."""
    turns, kept = cycle(sets), deque[Tensor | None](maxlen=len(sets))
    return lambda: kept.append(call(next(turns)).gradient)


def _device_us(work: Work) -> list[float]:
    """Microseconds on the device of a call, in each replay of a CUDA graph of many."""
    from triton.testing import do_bench_cudagraph

    try:
        return [1e3 * ms for ms in do_bench_cudagraph(work, return_mode="all")]
    except Exception as error:  # PyTorch leaves a capture that fails half open
        raise DeviceLostError(f"no CUDA graph could be captured: {one_line(error)}") from error


def _host_us(work: Work) -> float:
    """Microseconds of a call made by Python, back to back with others."""
    return 1e6 * seconds_of(repeated(work, HOST_CALLS)) / HOST_CALLS
