"""Trains one run of an ablation as a process of its own."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.ablate.plan import ROOT, Job

PR_SET_PDEATHSIG = 1  # prctl(2)
LINES_SHOWN = ("evaluated:", "resuming after", "train: error:", "train: warning:")


@dataclass(frozen=True)
class Result:
    """What became of a run: its summary.json, or why there is none."""

    job: Job
    summary: dict[str, Any] | None
    reason: str = ""


def command(job: Job, ranks: int) -> list[str]:
    """What a user would type."""
    train = [str(ROOT / "mpl_fast" / "train.py"), *job.arguments]
    if ranks == 1:
        return [sys.executable, *train]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, *train]


def run(job: Job, ranks: int, log: Path) -> Result:
    """Trains to the end, or on from where it was stopped; shows evaluations and writes all to
    `log`. Ctrl-C is raised anew once the run has saved what it had."""
    if not job.complete:
        log.parent.mkdir(parents=True, exist_ok=True)
        code, reason = _watched(command(job, ranks), log)
        if code:
            return Result(job, None, reason or f"ended with exit code {code}, see {log.name}")
    try:
        return Result(job, json.loads((job.folder / "summary.json").read_text()))
    except (OSError, ValueError):
        return Result(job, None, f"ended without a summary, see {log.name}")


def _watched(arguments: list[str], log: Path) -> tuple[int, str]:
    """Exit code, and the error that the run told."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    interrupted, reason = False, ""
    with log.open("a", encoding="utf-8") as lines:
        while True:
            try:
                for line in process.stdout:
                    lines.write(line)
                    lines.flush()
                    if any(word in line for word in LINES_SHOWN):
                        print(f"  {line.strip()}", flush=True)
                    if "train: error:" in line:
                        reason = line.partition("train: error:")[2].strip()
                code = process.wait()
                break
            except KeyboardInterrupt:  # which the run has received as well, and saves
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return code, reason


def _stop_with_parent() -> None:
    """Asks Linux for a SIGTERM when the ablation dies: the run saves, and frees its folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
