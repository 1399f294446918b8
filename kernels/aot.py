"""Compiles every kernel for GPUs that are not here; reports registers, spills, access widths.

    python -m mpl_fast.kernels.aot [--arch 80 90 100] [--only NAME ...] [--json FILE]

The functions of `fused` run on small CPU tensors with a simulated driver; where they would launch a
kernel, Triton compiles it instead. Exit code 1: a kernel spills, reads or writes rows in less than
16 bytes at a time although their pitch would allow it, or does not compile.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
# One small block; ImageNet; the widest row that stays in registers; in a loop, ImageNet-21k with
# an odd pitch, and padded to a multiple of 8.
CLASSES = (10, 1000, 8192, 21841, 21848)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Job(NamedTuple):
    """A variant of a function for one kind of rows and one architecture."""

    arch: int
    variant: str  # a key of `variants.VARIANTS`
    classes: int
    dtype: str

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.variant}, {self.classes} classes, {self.dtype}"


class Compiled(NamedTuple):
    """One kernel and its resources; see `machine_code.Code`."""

    kernel: str
    job: Job
    digest: str  # of code and options: what two variants share is compiled once
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    narrow: tuple[str, ...]
    seconds: float


class SimulatedDriver:
    """Reports a GPU of some architecture, so that Triton compiles for it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # not a number, so never mistaken for a real device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def recording(arch: int) -> Iterator[list[tuple[str, Any, float]]]:
    """Inside, every launch compiles for `arch` and adds (kernel's name, result, seconds) here."""
    from triton.runtime import JITFunction, driver

    launches: list[tuple[str, Any, float]] = []
    previous, run, cache = driver._active, JITFunction.run, os.environ.get("TRITON_CACHE_DIR")

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        began = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, kernel, time.perf_counter() - began))
        return kernel

    with tempfile.TemporaryDirectory() as folder:
        # An empty cache: seconds mean compiling, and what was left by a fault is not found again.
        os.environ["TRITON_CACHE_DIR"] = folder
        driver._active, JITFunction.run = SimulatedDriver(arch), record
        try:
            yield launches
        finally:
            driver._active, JITFunction.run = previous, run
            del os.environ["TRITON_CACHE_DIR"]
            if cache is not None:
                os.environ["TRITON_CACHE_DIR"] = cache


def compile_job(job: Job) -> list[Compiled] | str:
    """The kernels that a job launches, or in a line why there are none."""
    from mpl_fast.kernels import machine_code, variants

    rows = variants.Rows(job.classes, getattr(torch, job.dtype))
    try:
        with recording(job.arch) as launches:
            variants.VARIANTS[job.variant](rows)
    except Exception as error:  # whatever it is, the other kernels' report is worth having
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[-300:]}"
    if not launches:
        return "launches no kernel"
    return [
        Compiled(
            name, job, kernel.hash, kernel.metadata.num_warps, *machine_code.read(kernel), seconds
        )
        for name, kernel, seconds in launches
    ]


def compile_all(
    jobs: Sequence[Job], processes: int, report: Callable[[str], None]
) -> tuple[list[Compiled], list[str]]:
    """All different kernels of these jobs, and a line for each job that failed."""
    kernels: dict[tuple[int, str], Compiled] = {}
    failures = []
    for number, (job, found) in enumerate(_results(jobs, processes), 1):
        report(f"{number}/{len(jobs)} {job}")
        if isinstance(found, str):
            failures.append(f"{job}: {found}")
        else:
            for one in found:
                kernels.setdefault((job.arch, one.digest), one)
    return [*kernels.values()], failures


def _results(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, list[Compiled] | str]]:
    if processes <= 1:
        yield from ((job, compile_job(job)) for job in jobs)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from zip(jobs, pool.imap(compile_job, jobs), strict=True)


def faults(kernel: Compiled) -> list[str]:
    """What is wrong with a kernel, a line each."""
    from mpl_fast.kernels.machine_code import WIDE

    found = []
    if kernel.stack or kernel.local:
        found.append(f"spills {kernel.stack} bytes of stack, {kernel.local} of local memory")
    pitch = kernel.job.classes * getattr(torch, kernel.job.dtype).itemsize
    for kind, verb in (("loads", "reads"), ("stores", "writes")):
        if kind in kernel.narrow and pitch % WIDE == 0:
            widths = getattr(kernel, kind)
            found.append(f"{verb} rows of {pitch} bytes {min(widths)} bytes at a time")
    if not kernel.loads:
        found.append("no load of a row was found in its code")
    return [f"{kernel.kernel}, {kernel.job}: {text}" for text in found]


def table(kernels: Sequence[Compiled]) -> str:
    """A line for each kernel; `load` and `store` are the fewest bytes of an access to a row."""
    head = ("kernel", "first launched by", "sm", "classes", "dtype", "warps", "registers")
    rows = [(*head, "stack", "local", "shared", "load", "store", "seconds")]
    for k in kernels:
        job = k.job
        rows.append(
            (
                *(k.kernel, job.variant, job.arch, job.classes, job.dtype, k.warps),
                *(k.registers, k.stack, k.local, k.shared),
                *(min(k.loads, default="-"), min(k.stores, default="-"), f"{k.seconds:.1f}"),
            )  # type: ignore[arg-type]
        )
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def all_jobs(architectures: Sequence[int], only: Sequence[str]) -> list[Job]:
    """The whole grid, or the variants whose names start with one of `only`."""
    from mpl_fast.kernels.variants import VARIANTS

    names = [name for name in VARIANTS if not only or name.startswith(tuple(only))]
    return [
        Job(arch, name, classes, str(dtype).removeprefix("torch."))
        for arch in architectures
        for name in names
        for classes in CLASSES
        for dtype in DTYPES
    ]


def unable() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        "aot", allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="N", help="80 90 100")
    add("--only", nargs="+", default=(), metavar="NAME", help="functions, such as teacher_loss")
    add("--json", type=Path, metavar="FILE", help="write the report there, too")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    add("--processes", type=int, default=cores, metavar="N", help=f"at once ({cores})")
    options = parser.parse_args(arguments)
    if reason := unable():
        print(f"aot: {reason}", file=sys.stderr)
        return 2
    jobs = all_jobs(options.arch, options.only)
    if not jobs:
        parser.error(f"--only {' '.join(options.only)}: no function has such a name")
    kernels, failures = compile_all(jobs, options.processes, _progress)
    wrong = failures + [text for kernel in kernels for text in faults(kernel)]
    if options.json:
        options.json.write_text(json.dumps(summary(kernels, wrong), indent=1) + "\n")
    print(table(kernels))
    print(f"{len(kernels)} kernels, {len(wrong)} faults")
    for text in wrong:
        print(f"FAULT {text}")
    return int(bool(wrong))


def summary(kernels: Sequence[Compiled], wrong: Sequence[str]) -> dict[str, Any]:
    """What --json writes."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    rows = [{**kernel._asdict(), "job": kernel.job._asdict()} for kernel in kernels]
    return {"versions": versions, "kernels": rows, "faults": [*wrong]}


def _progress(text: str) -> None:
    print(f"aot: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)
