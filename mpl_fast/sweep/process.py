"""One trial: a process of train.py, followed, pruned and ended with a result; and its GPUs."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import TrialState

from mpl_fast.config import RunConfig
from mpl_fast.errors import PREEMPTED, ConfigError, DataError, OutputError
from mpl_fast.first_few import counted
from mpl_fast.sweep.study import Claim
from mpl_fast.training.curves import SUMMARY, read_rows, read_summary
from mpl_fast.training.process import signal_when_parent_ends, visible_gpus
from mpl_fast.untrusted import yaml_object

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
STOPPED = (PREEMPTED, -signal.SIGTERM, -signal.SIGINT)
OF_ALL = (OutputError, DataError)  # not of one trial: a full disk, damaged records


class Outcome(NamedTuple):
    """How a trial ended."""

    state: TrialState
    top1: float | None
    reason: str  # why it is not complete
    code: int = 0  # exit code of train.py


class Training:
    """The process of a trial; its output is in train.log of the run directory."""

    def __init__(
        self,
        claim: Claim,
        folder: Path,
        arguments: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
    ) -> None:
        self.claim, self.folder, self.number = claim, folder, claim.trial.number
        self.pruned_at, self.stopping = -1, False
        self.latest: tuple[int, float] | None = None  # step and top-1 of the newest evaluation
        self.printed = time.monotonic()  # when its newest line was
        self._ranks, self._seen = ranks, -1
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(TRAIN), *arguments]
        with (folder / "train.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            self._began = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,  # Ctrl-C is for this process, which then stops the trials
                pass_fds=[claim.lock.fileno()],  # locked until the training has ended, too
                # If this process is killed, the training saves and ends.
                preexec_fn=partial(signal_when_parent_ends, signal.SIGTERM),
            )

    def follow(self) -> None:
        """Reports new evaluations to the study, and stops the training if it is to be pruned."""
        file, trial = self.folder / "metrics.jsonl", self.claim.trial
        if not file.exists() or file.stat().st_size == self._seen:
            return
        self._seen = file.stat().st_size
        known = trial.storage.get_trial(trial._trial_id).intermediate_values
        for row in read_rows(file):
            if "eval/top1" not in row:
                continue
            self.latest = row["step"], row["eval/top1"]
            if row["step"] in known:  # of a session before, or read before
                continue
            trial.report(row["eval/top1"], row["step"])
            ending = self.pruned_at >= 0 or self.stopping or row["step"] >= self._steps()
            if not ending and trial.should_prune():
                self.pruned_at = row["step"]
                self._process.terminate()

    def stop(self) -> None:
        """Has the training save and end; the trial stays a running one, to be continued."""
        if self.pruned_at < 0 and not self.stopping:
            self._process.terminate()
        self.stopping = True

    def wait(self) -> None:
        """Returns when the training has ended."""
        self._process.wait()

    def outcome(self) -> Outcome | None:
        """None while the training runs; an outcome in state RUNNING if it is to be continued.

        Raises `OutputError` or `DataError` for what no other trial would do without either.
        """
        if self._process.poll() is None:
            return None
        self.follow()
        code = self._exit_code()
        if code == 0:
            if summary := read_summary(self.folder):
                return Outcome(TrialState.COMPLETE, float(summary["top1"]), "")
            return Outcome(TrialState.FAIL, None, f"{self.folder / SUMMARY} is missing or damaged")
        if self.pruned_at >= 0:
            return Outcome(TrialState.PRUNED, None, f"pruned at step {self.pruned_at}")
        if self.stopping or code in STOPPED:
            return Outcome(TrialState.RUNNING, None, "")
        reason = self._reason(code)
        for kind in OF_ALL:
            if code == kind.exit_code:
                raise kind(f"trial {self.number}: {reason}")
        refused = code == ConfigError.exit_code
        return Outcome(TrialState.PRUNED if refused else TrialState.FAIL, None, reason, code)

    @property
    def seconds(self) -> float:
        """Of training, in all sessions."""
        file = self.folder / "metrics.jsonl"
        rows: list[dict[str, Any]] = read_rows(file) if file.exists() else []
        return float(sum(row.get("train_seconds", 0.0) for row in rows))

    def _steps(self) -> int:
        """Of the whole training, also where it was given in epochs; 0 if config.yaml is damaged."""
        steps = yaml_object(self.folder / "config.yaml").get("steps")
        return steps if isinstance(steps, int) else 0

    def _exit_code(self) -> int:
        """That of train.py: torchrun ends with 1, and prints the code of the first rank that has
        failed below "Root Cause"."""
        code = self._process.returncode
        cause = self._output().rpartition("Root Cause")[2] if self._ranks > 1 else ""
        found = re.search(r"exitcode\s*:\s*(-?\d+)", cause)
        return int(found[1]) if found and code else code

    def _reason(self, code: int) -> str:
        """The error that train.py has printed, else its last line."""
        lines = [line for line in self._output().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("train: error: ")]
        if errors:
            return errors[-1].removeprefix("train: error: ")
        last = f": {lines[-1].strip()}" if lines else ""
        return f"ended with code {code}{last} ({self.folder / 'train.log'})"

    def _output(self) -> str:
        """What this session has printed."""
        with (self.folder / "train.log").open(encoding="utf-8", errors="replace") as log:
            log.seek(self._began)
            return log.read()


def slots(config: RunConfig, ranks: int, jobs: int, trials: int) -> list[dict[str, str]]:
    """The environment of each trial that runs at a time: its GPUs and its CPU threads.

    A trial has `ranks` GPUs, or CPU cores where there is no GPU. `jobs` is how many trials run at
    a time; 0: as many of the `trials` as there are GPUs or cores for. Raises `ConfigError` for
    more.
    """
    gpus = [] if config.device == "cpu" else visible_gpus()
    cores = len(os.sched_getaffinity(0))
    what, have = ("GPU", len(gpus)) if gpus else ("CPU core", cores)
    if config.device == "cuda" and not gpus:
        raise ConfigError("device is cuda, but no GPU is visible: give --device cpu")
    most = have // ranks
    if gpus and not most:
        raise ConfigError(
            f"--ranks-per-trial {ranks} needs as many GPUs, there are {have}: lower it to {have}"
        )
    jobs = jobs or max(1, min(most, trials))
    if jobs > max(1, most):
        raise ConfigError(
            f"--jobs {jobs} with {counted(ranks, 'rank')} each is more than {counted(have, what)}: "
            f"give {max(1, most)} or auto"
        )
    share = str(max(1, cores // (jobs * ranks)))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    if not gpus:
        return [threads] * jobs
    groups = (gpus[job * ranks : (job + 1) * ranks] for job in range(jobs))
    return [threads | {"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
