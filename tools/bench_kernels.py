"""Measures the fused losses against plain PyTorch, torch.compile, Liger and apex on a GPU.

First they are compared with float64 at a few shapes; each is compared again wherever it is timed,
and one that is wrong is marked and not timed. Cells follow in the order of their importance, in
random order where that is equal, as many as `--minutes` allows: the report names the ones left out.
The JSON is written after each of them.
`--smoke` counts launches and bytes on a CPU, and claims nothing about speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tools.bench_losses import contestants, correctness
from tools.bench_losses.capture import DeviceLostError, require_device
from tools.bench_losses.correctness import line
from tools.bench_losses.machine import describe
from tools.bench_losses.problems import Shape
from tools.bench_losses.progress import Progress, say, write_json
from tools.bench_losses.report import ratios, tables

Json = dict[str, Any]
MARGIN = 10.0  # seconds before the end by which everything should be done


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a contestant is wrong. 2: there is no GPU. 3: it became unusable."""
    began = time.monotonic()
    options = _options(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("bench_kernels: there is no CUDA device; --smoke runs without one", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: Json = {"claim": "", "machine": describe(options.commit), "seed": options.seed}
    result |= {"correctness": [], "cells": [], "skipped": []}
    if options.smoke:
        from tools.bench_losses.smoke import CLAIM, smoke

        print(CLAIM)
        result |= smoke(say)
        result["machine"]["gpu"] = None
    else:
        _on_gpu(result, options, began)
    _write(result, options)
    print(tables(result, markdown=False))
    wrong = [row for row in result["correctness"] + result["cells"] if row.get("wrong")]
    return 3 if "device" in result else int(bool(wrong or result.get("aot_faults")))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="counts and correctness on a CPU, nothing of speed")
    add("--minutes", type=float, default=8.0, metavar="N", help="time for everything together (8)")
    add("--seed", type=int, default=0, metavar="N", help="of the order of measuring (0)")
    add("--out", type=Path, default=Path("runs/bench_kernels.json"), help="JSON file")
    add("--markdown", type=Path, metavar="FILE", help="write the tables for docs/ there, too")
    add("--commit", metavar="NAME", help="where there is no git to ask")
    return parser.parse_args(arguments)


def _on_gpu(result: Json, options: argparse.Namespace, began: float) -> None:
    """Fills the result, until the time is over or the device is lost."""
    deadline = began + 60.0 * options.minutes - MARGIN
    progress = Progress(result, deadline, lambda: _write(result, options))
    try:
        _all(result, progress, random.Random(options.seed))
    except DeviceLostError as lost:
        result["device"] = str(lost)


def _all(result: Json, progress: Progress, order: random.Random) -> None:
    from tools.bench_losses import cells, clock, step, sweep

    say("correctness against float64")
    names = (*contestants.OURS, contestants.PLAIN, contestants.EAGER)
    correctness.check(correctness.SHAPES, names, "cuda", result["correctness"].append)
    require_device()
    say("what the machine can do")
    result["copy_gb_per_s"] = clock.copy_bandwidth()
    result["launch_cost"] = clock.launch_cost()
    result["sweep"] = []
    _measure([cells.GOALS], progress, order)
    if progress.allows("the same cell twice", "noise"):
        with _attempt("the same cell twice", result):
            result["noise"] = sweep.same_twice(cells.GOALS[0], order)
    for shape in sweep.SHAPES:
        what = f"launch configurations, {shape}"
        if progress.allows(what, "sweep"):
            with progress.timed("sweep"), _attempt(what, result):
                result["sweep"].append(sweep.sweep(shape, order))
    what = "the losses' share of a ResNet-50 step"
    if progress.allows(what, "step"):
        with progress.timed("step"), _attempt(what, result):
            result["step"] = step.share(progress, order)
    _measure([cells.NEXT, *cells.rest()], progress, order)


def _measure(classes: Sequence[list[Shape]], progress: Progress, order: random.Random) -> None:
    """Class after class of equal importance, each in random order."""
    from tools.bench_losses import cells

    for shapes in classes:
        for shape in order.sample(shapes, len(shapes)):
            cells.measure(shape, cells.entrants(shape), progress, order)


@contextmanager
def _attempt(what: str, result: Json) -> Iterator[None]:
    """What fails here, such as a package that is missing, does not end the run."""
    try:
        yield
    except DeviceLostError:
        raise
    except Exception as error:
        result["skipped"].append(f"failed: {what}: {line(error)}")
        require_device()


def _write(result: Json, options: argparse.Namespace) -> None:
    """The JSON as far as it is known; and the tables."""
    if "copy_gb_per_s" in result:
        ratios(result["cells"], result["copy_gb_per_s"])
    write_json(result, options.out)
    if options.markdown:
        options.markdown.write_text(tables(result, markdown=True))


if __name__ == "__main__":
    raise SystemExit(main())
