"""Measures the fused losses against plain PyTorch, torch.compile and Liger on a GPU.

First plain PyTorch and ours are compared with float64; a wrong one ends the run. Then the cells
follow in the order of their importance, as many as `--minutes` allows: the report names the ones
left out.
`--smoke` counts launches and bytes on a CPU, and claims nothing about speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from tools.bench_losses import contestants, correctness
from tools.bench_losses.machine import describe
from tools.bench_losses.problems import Shape
from tools.bench_losses.report import ratios, tables

Json = dict[str, Any]
MARGIN = 20.0  # seconds before the end in which nothing is started: the longest compilation


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a contestant is wrong. 2: there is no GPU."""
    options = _options(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("bench_kernels: there is no CUDA device; --smoke runs without one", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: Json = {"claim": "", "machine": describe(options.commit), "cells": [], "skipped": []}
    if options.smoke:
        from tools.bench_losses.smoke import CLAIM, smoke

        print(CLAIM)
        result |= smoke(_say)
        result["machine"]["gpu"] = None
    else:
        _on_gpu(result, options)
    wrong = [row for row in result["correctness"] if row["wrong"]]
    _write(result, options)
    print(tables(result, markdown=False))
    for row in wrong:
        print(f"WRONG: {row['shape']}, {row['contestant']}: {row['wrong']}")
    return int(bool(wrong or result.get("aot_faults")))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="counts and correctness on a CPU, nothing of speed")
    add("--minutes", type=float, default=8.0, metavar="N", help="time for all cells together (8)")
    add("--out", type=Path, default=Path("runs/bench_kernels.json"), help="JSON file")
    add("--markdown", type=Path, metavar="FILE", help="write the tables for docs/ there, too")
    add("--commit", metavar="NAME", help="where there is no git to ask")
    return parser.parse_args(arguments)


def _on_gpu(result: Json, options: argparse.Namespace) -> None:
    """Fills the result; it is written after every shape, so that a stop loses little."""
    from tools.bench_losses import cells, clock, step, sweep

    deadline = time.monotonic() + 60.0 * options.minutes - MARGIN
    names = (contestants.EAGER, *contestants.OURS)
    _say("correctness against float64")
    result["correctness"] = correctness.check(correctness.SHAPES, names, "cuda")
    if any(row["wrong"] for row in result["correctness"]):
        result["claim"] = "Nothing was timed: a contestant is wrong."
        return
    _say("what the machine can do")
    result["copy_gb_per_s"] = clock.copy_bandwidth()
    result["launch_cost"] = clock.launch_cost()
    _measure(cells.FIRST, result, options, deadline)
    noise = cells.FIRST[0]
    if _time_for("the same cell twice", result, deadline):
        result["noise"] = sweep.same_twice(noise, clock.input_sets(noise))
    result["sweep"] = []
    for shape in sweep.SHAPES:
        if _time_for(f"launch configurations, {shape}", result, deadline):
            result["sweep"].append(sweep.sweep(shape))
            _write(result, options)
    if _time_for("the loss's share of a ResNet-50 step", result, deadline):
        try:
            result["step"] = step.share(result["cells"])
        except Exception as error:  # such as timm that is not installed
            result["skipped"].append(f"the loss's share of a step: {type(error).__name__}: {error}")
    _measure([*cells.rest()], result, options, deadline)


def _measure(
    shapes: Sequence[Shape], result: Json, options: argparse.Namespace, deadline: float
) -> None:
    from tools.bench_losses import cells

    for shape in shapes:
        for name in contestants.names(shape):
            if _time_for(f"{shape}, {name}", result, deadline):
                result["cells"].append(cells.measure(shape, name))
        _write(result, options)


def _time_for(what: str, result: Json, deadline: float) -> bool:
    """Whether there is time left; notes what is skipped."""
    if time.monotonic() < deadline:
        _say(what)
        return True
    result["skipped"].append(what)
    return False


def _write(result: Json, options: argparse.Namespace) -> None:
    """The JSON as far as it is known, aside first; and the tables."""
    if "copy_gb_per_s" in result:
        ratios(result["cells"], result["copy_gb_per_s"])
    aside = options.out.with_name(options.out.name + ".tmp")
    aside.write_text(json.dumps(result, indent=1, default=str) + "\n")
    aside.replace(options.out)
    if options.markdown:
        options.markdown.write_text(tables(result, markdown=True))


def _say(line: str) -> None:
    print(f"bench_kernels: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
