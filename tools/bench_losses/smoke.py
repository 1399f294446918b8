"""What can be said without a GPU, in less than a minute: counts and correctness, not speed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mpl_fast.kernels import aot
from tools.bench_losses import contestants, correctness, counts, others
from tools.bench_losses.contestants import AUTOTUNED, COMPILED, EAGER, PLAIN
from tools.bench_losses.problems import LOSSES, Shape

Json = dict[str, Any]
CLAIM = "No claim about speed: there is no GPU here, and nothing was timed."
CLASSES, BATCH = (100, 1000), 256
SHAPES = [(100, 100, torch.float32), (1000, 1000, torch.bfloat16), (1000, 1008, torch.float16)]
SECONDS = 50.0  # by which all compiling has to end
KERNEL = aot.Job(90, "teacher_loss_and_grad weak", 1000, 1000, "bfloat16")
ROOT = Path(__file__).resolve().parents[2]
# The cheapest loss in every mode, always; the first compilation also pays for what all share. Then
# the others, while there is time.
COMPILATIONS = [("pseudo", COMPILED), ("pseudo", AUTOTUNED), ("teacher", COMPILED)]
COMPILATIONS += [("student", COMPILED), ("feedback", COMPILED)]


def smoke(say: Callable[[str], None]) -> Json:
    """Everybody who runs on a CPU is counted and compared; one kernel is compiled for sm_90."""
    began = time.monotonic()
    say("our kernels on Triton's interpreter, beside the rest")
    interpreter = _start_interpreter()
    say("correctness against float64")
    checked = correctness.check(SHAPES, [PLAIN, EAGER], "cpu")
    say("launches and bytes of plain PyTorch")
    shapes = [
        Shape(loss, classes, classes, BATCH, torch.bfloat16)
        for classes in CLASSES
        for loss in LOSSES
    ]
    cells = [counts.eager(shape, name) for shape in shapes for name in (PLAIN, EAGER)]
    kernels, faults = _ahead_of_time(say)
    compiled, skipped = _compiled(began, say)
    cells += compiled
    if interpreter is None:
        skipped += [f"no triton: {name}" for name in contestants.OURS]
    else:
        cells += _end_of(interpreter)
    return {
        "claim": CLAIM,
        "correctness": checked,
        "cells": cells,
        "aot": kernels,
        "aot_faults": faults,
        "skipped": skipped + _cannot_run(),
    }


def _compiled(began: float, say: Callable[[str], None]) -> tuple[list[Json], list[str]]:
    """Cells of torch.compile, and for which ones there was no time."""
    cells: list[Json] = []
    skipped, guess = [], 0.0
    for loss, name in COMPILATIONS:
        shape = Shape(loss, CLASSES[0], CLASSES[0], BATCH, torch.bfloat16)
        start = time.monotonic()
        if len(cells) >= len(contestants.MODES) and start - began + guess > SECONDS:
            skipped.append(f"no time: {shape}, {name}")
            continue
        say(f"{name} of {shape}")
        cells.append(counts.compiled(shape, name))
        # The first one takes what all share, such as the compiler's headers.
        guess = (time.monotonic() - start) * (1.0 if len(cells) > 1 else 0.4)
    compiled = f"torch.compile at {CLASSES[1]} classes, where it makes the same of it"
    return cells, [*skipped, f"never in a smoke test: {compiled}"]


def _cannot_run() -> list[str]:
    """Who needs a GPU."""
    missing = {
        contestants.LIGER: others.has_liger(),
        contestants.APEX: bool(others.apex_cross_entropy()),
    }
    return [
        f"{name}: {'needs a GPU' if there else 'is not installed'}"
        for name, there in missing.items()
    ]


def _start_interpreter() -> subprocess.Popen[str] | None:
    if find_spec("triton") is None:
        return None
    command = [sys.executable, "-m", "tools.bench_losses.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def _end_of(interpreter: subprocess.Popen[str]) -> list[Json]:
    """Its cells."""
    printed, _ = interpreter.communicate()
    if interpreter.returncode:
        raise RuntimeError("tools.bench_losses.interpreted failed: see above")
    cells: list[Json] = json.loads(printed)
    return cells


def _ahead_of_time(say: Callable[[str], None]) -> tuple[list[Json], list[str]]:
    """The teacher's kernel; or why it cannot be compiled here."""
    if reason := aot.unable():
        return [], [f"not compiled: {reason}"]
    kernels, failures = aot.compile_all([KERNEL], 1, say)
    wrong = failures + [fault for kernel in kernels for fault in aot.faults(kernel)]
    print(aot.table(kernels))
    return [{**kernel._asdict(), "job": kernel.job._asdict()} for kernel in kernels], wrong
