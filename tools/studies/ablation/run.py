"""Trains one run of an ablation as a process of its own."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpl_fast.errors import PREEMPTED
from mpl_fast.training.curves import SUMMARY, read_summary
from mpl_fast.training.process import signal_when_parent_ends
from tools.studies.ablation.plan import Job

TRAIN = Path(__file__).resolve().parents[3] / "mpl_fast" / "train.py"
LINES_SHOWN = ("evaluated:", "resuming after", "train: error:")
WARNING = "warning: "  # how a line of such begins
SESSION = "\n$ "  # before the command, in a log


@dataclass(frozen=True)
class Result:
    """A run's summary.json, or the reason why there is none."""

    job: Job
    summary: dict[str, Any] | None
    reason: str = ""
    warnings: tuple[str, ...] = ()
    stopped: bool = False
    """By a signal, after saving."""

    @property
    def outcome(self) -> str:
        """For a message."""
        if not self.summary:
            return f"failed: {self.reason}"
        return "top-1 {top1:.2f} % in {train_seconds:.0f} s of training".format(**self.summary)


def run(job: Job, ranks: int, log: Path, shown: set[tuple[str, str]]) -> Result:
    """Trains to the end, or resumes; shows evaluations and warnings and writes all to `log`. Raises
    KeyboardInterrupt, after Ctrl-C, once the run has saved its state.

    `shown`: variants with a warning that was shown already; grows.
    """
    reason, code, summary = "", 0, None
    if not job.complete:
        log.parent.mkdir(parents=True, exist_ok=True)
        reason, code = _train(job, ranks, log, shown)
    if not reason:
        summary = read_summary(job.folder)
        reason = "" if summary else f"ended without a sound {SUMMARY}, see {log.name}"
    return Result(job, summary or None, reason, _warnings(log), code == PREEMPTED)


def _train(job: Job, ranks: int, log: Path, shown: set[tuple[str, str]]) -> tuple[str, int]:
    """Returns why the run failed: the error that it has printed, empty if it has not; and its exit
    code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(TRAIN), *job.arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # If the ablation is killed, the run saves, and unlocks its folder.
        preexec_fn=partial(signal_when_parent_ends, signal.SIGTERM),
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    interrupted, reason = False, ""
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"{SESSION}{shlex.join(command)}\n")
        while True:
            try:
                for line in process.stdout:
                    lines.write(line)
                    lines.flush()
                    _show(line.strip(), job, shown)
                    if "train: error:" in line:
                        reason = line.partition("train: error:")[2].strip()
                code = process.wait()
                break
            except KeyboardInterrupt:  # the run has received it as well, and saves
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return (reason or f"ended with exit code {code}, see {log.name}") if code else "", code


def _show(line: str, job: Job, shown: set[tuple[str, str]]) -> None:
    """A warning once for all seeds of a variant, which mostly share it."""
    if line.startswith(WARNING) and (job.variant.name, line) not in shown:
        shown.add((job.variant.name, line))
        print(f"  {job.name}: {line}", flush=True)
    elif any(word in line for word in LINES_SHOWN):
        print(f"  {line}", flush=True)


def _warnings(log: Path) -> tuple[str, ...]:
    """Of the last session: those before it may have had other settings."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    session = text.rpartition(SESSION)[2].splitlines()
    return tuple(line.removeprefix(WARNING) for line in session if line.startswith(WARNING))
