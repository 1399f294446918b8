"""What can be said without a GPU, in less than a minute: counts and correctness, not speed."""

import time
from collections.abc import Callable
from typing import Any

import torch

from mpl_fast.kernels import aot
from tools.bench_losses import contestants, correctness, counts
from tools.bench_losses.problems import LOSSES, Shape

Json = dict[str, Any]
CLAIM = "No claim about speed: there is no GPU here, and nothing was timed."
CLASSES, BATCH = (100, 1000), 256
SHAPES = [(100, 100, torch.float32), (1000, 1000, torch.bfloat16), (1000, 1008, torch.float16)]
SECONDS = 40.0  # within which all compiling has to end
CHEAP = ("student", "teacher", "pseudo")  # from quick to slow to compile, labels last
KERNEL = aot.Job(90, "teacher_loss_and_grad weak", 1000, 1000, "bfloat16")


def smoke(say: Callable[[str], None]) -> Json:
    """Correctness of the reference, its launches and bytes, and one kernel compiled for sm_90."""
    began = time.monotonic()
    say("correctness against float64")
    checked = correctness.check(SHAPES, [contestants.EAGER], "cpu")
    rows, skipped = [], []
    shapes = [
        Shape(loss, classes, classes, BATCH, torch.bfloat16)
        for classes in CLASSES
        for loss in LOSSES
    ]
    say("launches and bytes of plain PyTorch")
    rows += [counts.eager(shape) for shape in shapes]
    kernels, faults = _ahead_of_time(say)
    longest = 0.0
    for shape in sorted(shapes, key=lambda shape: (shape.classes, CHEAP.index(shape.loss))):
        start = time.monotonic()
        if start - began + 2.5 * longest > SECONDS:
            skipped.append(f"{shape} {contestants.COMPILED}")
            continue
        say(f"torch.compile of {shape}")
        rows.append(counts.compiled(shape))
        longest = max(longest, time.monotonic() - start)
    return {
        "claim": CLAIM,
        "correctness": checked,
        "cells": rows,
        "aot": kernels,
        "aot_faults": faults,
        "skipped": skipped,
    }


def _ahead_of_time(say: Callable[[str], None]) -> tuple[list[Json], list[str]]:
    """The teacher's kernel; or why it cannot be compiled here."""
    if reason := aot.unable():
        return [], [f"not compiled: {reason}"]
    kernels, failures = aot.compile_all([KERNEL], 1, say)
    wrong = failures + [fault for kernel in kernels for fault in aot.faults(kernel)]
    print(aot.table(kernels))
    return [{**kernel._asdict(), "job": kernel.job._asdict()} for kernel in kernels], wrong
