"""The soak: many tiny steps of one run, whose memory, files and threads must not grow."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from tests import tiny_run
from tools.faults.cases import Case
from tools.faults.processes import Used, descendants, ended, kill, started, used

SECONDS = 1.0  # between samples
GROWTH = 16 << 20  # bytes of memory from the second third of the samples to the last
PER_STEP = 64.0  # bytes; a longer run may grow by more
LEAST = 9  # samples


def soak(out: Path, rec: Path, steps: int, ends: float) -> Case:
    """Trains `steps` steps, with a checkpoint and an evaluation now and then; resumes after a stop
    of the campaign. `ends`: a time of `time.monotonic`, after which it is stopped."""
    began, folder = time.monotonic(), out / "soak" / "run"
    samples: list[Used] = []
    options = tiny_run.arguments(folder, rec, recipe="mpl")
    options += [
        "--steps",
        str(steps),
        "--log-every",
        "50",
        "--eval-every",
        str(max(1, steps // 40)),
    ]
    options += ["--checkpoint-every", str(max(1, steps // 80))]
    process = started(tiny_run.command(options), folder.parent / "log", tiny_run.environment())
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(SECONDS)
        if (folder / "metrics.jsonl").exists() and (sample := used(process.pid)):
            samples.append(sample)
    in_time = process.poll() is not None
    if not in_time:
        kill([process.pid, *descendants(process.pid)])
    code = ended(process)
    rows = tiny_run.rows(folder) if (folder / "metrics.jsonl").exists() else []
    done = max((row["step"] for row in rows), default=0)
    faults = growth(samples, done)
    if in_time and code != 0:
        faults.append(f"the run ended with {code}")
    about = {
        "steps": done,
        "samples": len(samples),
        "memory_mb": [round(s.memory / 1e6, 1) for s in samples[:: max(1, len(samples) // 20)]],
        "files": [min(s.files for s in samples), max(s.files for s in samples)] if samples else [],
        "threads": [min(s.threads for s in samples), max(s.threads for s in samples)]
        if samples
        else [],
    }
    (out / "soak" / "samples.json").write_text(json.dumps(samples))
    outcome = "failed" if faults else "passed"
    if not in_time and not faults:
        outcome, faults = "skipped", [f"stopped by the time after {done} of {steps} steps"]
    seconds = time.monotonic() - began
    return Case(f"soak {steps}", "soak", outcome, seconds, 0, "; ".join(faults), about)


def growth(samples: Sequence[Used], steps: int) -> list[str]:
    """What has grown from the second third of the samples to the last; the first third warms up."""
    if len(samples) < LEAST:
        return [f"only {len(samples)} samples, {LEAST} are needed: more steps"]
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    faults = []
    grown = statistics.median(s.memory for s in last) - statistics.median(s.memory for s in middle)
    allowed = max(GROWTH, PER_STEP * steps / 3)
    if grown > allowed:
        faults.append(f"memory grew by {grown / 1e6:.0f} MB, {allowed / 1e6:.0f} are allowed")
    for name in ("files", "threads"):
        before, after = (max(getattr(s, name) for s in part) for part in (middle, last))
        least = min(getattr(s, name) for s in last)
        if after > before + 2 or least > before:
            faults.append(f"{name} grew from {before} to {after}")
    return faults
