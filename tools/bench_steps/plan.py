"""Which benchmarks make up a whole run on one machine, and how its time is shared out."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ("tests/kernels/test_gpu_kernels.py", "tests/kernels/test_gpu_graphs.py")
TESTS = (*KERNEL_TESTS, "tests/test_gpu_run.py")
MEASURING = 0.75  # of a benchmark's time, for what it is told; the rest: imports, what is begun
SHORTEST = 10.0  # seconds in which no benchmark gets anywhere


class Job(NamedTuple):
    """A command that takes part; `share` is of the time, in any unit."""

    name: str
    command: tuple[str, ...]
    share: float
    minutes: bool = True  # whether it can be told how long to measure
    markdown: bool = False  # whether it writes its tables as a page, too
    result: bool = True  # whether it writes a JSON file
    most: float = float("inf")  # seconds


def jobs(*, gpu: bool, smoke: bool, rec: str | None) -> tuple[list[Job], list[str]]:
    """Everything that can run here, the most important first, and why others cannot."""
    device = ("--device", "cuda" if gpu else "cpu")
    models = () if gpu else ("--models", "wrn_28_2")
    made = [*_steps(gpu, smoke), _bench("bench_backbone", 70.0, *device, *models)]
    # Without a GPU it counts and compares, and times nothing.
    kernels = _bench("bench_kernels", 50.0, *([] if gpu or smoke else ["--smoke"]))
    made.append(kernels._replace(markdown=True))
    left_out = []
    if rec or smoke:
        options = ["--device", "gpu" if gpu else "cpu", *(["--rec", rec] if rec else [])]
        options += ["--threads", str(len(os.sched_getaffinity(0)))]
        made.append(_bench("bench_data", 60.0, *options))
    else:
        left_out.append("bench_data: it reads records, which --rec names")
    others = {"syncs": 30.0, "optim": 20.0, "ckpt": 25.0, "startup": 40.0, "scaling": 20.0}
    made += [_bench(f"bench_{name}", share, *device) for name, share in others.items()]
    there = [job for job in made if not job.result or Path(job.command[1]).exists()]
    left_out += [f"{job.name}: there is no such script" for job in made if job not in there]
    return there, left_out


def command(job: Job, out: Path, seconds: float, *, smoke: bool, commit: str | None) -> list[str]:
    """What is run: the job's own command, where it writes, and how long it may measure."""
    given = [*job.command]
    if not job.result:
        return given
    given += ["--out", str(out / f"{job.name}.json")]
    if job.markdown:
        given += ["--markdown", str(out / f"{job.name}.md")]
    if job.minutes and not smoke:
        given += ["--minutes", f"{MEASURING * seconds / 60.0:.3f}"]
    if commit:
        given += ["--commit", commit]
    return given + (["--smoke"] if smoke and "--smoke" not in given else [])


def allowance(waiting: list[Job], left: float) -> float:
    """Seconds for the first of those that wait: its share of what is left, up to its `most`.

    What one does not use goes to those behind it.
    """
    first = waiting[0]
    return min(first.most, left * first.share / sum(job.share for job in waiting))


def _steps(gpu: bool, smoke: bool) -> list[Job]:
    if smoke or not gpu:
        device = "cuda" if gpu else "cpu"
        return [_bench("bench_step", 90.0 if smoke else 300.0, "--device", device)]
    script = (*_script("bench_step"), "--device", "cuda")
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *TESTS)
    small = (*script, "--model", "wrn_28_2")
    # In float32 and NCHW so many images of 224 pixels just fit into 80 GB.
    large = (*script, "--model", "resnet50", "--labeled", "32")
    return [
        Job("gpu_tests", tests, 60.0, minutes=False, result=False, most=60.0),
        Job("bench_step_wrn_28_2", small, 150.0),
        Job("bench_step_resnet50", large, 170.0),
    ]


def _bench(name: str, share: float, *options: str) -> Job:
    return Job(name, (*_script(name), *options), share)


def _script(name: str) -> tuple[str, str]:
    return sys.executable, str(ROOT / "tools" / f"{name}.py")
