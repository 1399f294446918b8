"""The loop of a sweep's worker: claims trials, follows their training and records their results."""

import os
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from mpl_fast.atomic import write_text
from mpl_fast.config import RunConfig
from mpl_fast.config.command_line import as_arguments, as_yaml, parse
from mpl_fast.config.fields import replaced
from mpl_fast.errors import PREEMPTED, ConfigError, OutputError, UserError, output_errors
from mpl_fast.first_few import counted
from mpl_fast.sweep.process import Outcome, Training
from mpl_fast.sweep.ranges import draw, shown
from mpl_fast.sweep.results import best_first, draw_figures, table, write_csv
from mpl_fast.sweep.study import DONE, Claim, Trials
from mpl_fast.training.process import stop_on_signal

POLL_SECONDS = 0.2
WAIT_SECONDS = 2.0  # between looks at the trials of other workers
LINE_SECONDS = 30.0  # after which an evaluation of a trial has a line of its own
STDERR = 2
ALIKE = 3  # trials that all end with one and the same configuration error end the sweep


@dataclass
class Worker:
    """One process of a sweep."""

    trials: Trials
    ranges: Mapping[str, BaseDistribution]
    arguments: list[str]  # of train.py, for every trial
    shares: list[str]  # of train.py, for the trials that share this machine
    rec: Path
    """Of the final training: the whole labeled split."""
    held_out: int
    """Images that choose."""
    most: int
    slots: list[dict[str, str]]
    ranks: int
    deadline: float  # of time.monotonic
    running: dict[int, Training] = field(default_factory=dict)  # by slot
    stopping: str = ""
    next_look: float = 0.0  # for trials to claim, after there were none; of time.monotonic

    def run(self) -> int:
        """Trains until all trials have ended, the time is over or a signal; returns the exit code.

        Raises `UserError` for what ends all trials alike; those that run then save.
        """
        try:
            with stop_on_signal(lambda: self._stop("stopped by a signal")):
                while self._work():
                    time.sleep(POLL_SECONDS)
        except (UserError, StorageInternalError) as error:
            self._stop("an error")
            for training in self.running.values():
                training.wait()
            if isinstance(error, UserError):
                raise
            reason = str(error.__cause__ or error).splitlines()[0]
            raise OutputError(f"{self.trials.storage.shown(self.trials.out)}: {reason}") from None
        self._summarize()
        return PREEMPTED if self.stopping == "stopped by a signal" else 0

    def _work(self) -> bool:
        """Looks at the running trials and starts others; returns whether there is more to do."""
        if not self.stopping and time.monotonic() > self.deadline:
            self._stop("--timeout is over")
        self._poll()
        while not self.stopping and len(self.running) < len(self.slots):
            if time.monotonic() < self.next_look:
                return True
            claim = self.trials.claim(self.most)
            if claim:
                self._start(claim)
            elif self.running or (left := self._left()):  # other workers may leave theirs behind
                if not (self.running or self.next_look):
                    print(f"waiting for {counted(left, 'trial')} of other workers", flush=True)
                self.next_look = time.monotonic() + WAIT_SECONDS
            else:
                return False
        return bool(self.running) or not self.stopping

    def _stop(self, why: str) -> None:
        """Has all running trials save; in a signal handler, too."""
        if not self.stopping and self.running:
            with suppress(OSError):  # without a buffer, which a signal may find amid a write
                os.write(STDERR, f"sweep: {why}: running trials save\n".encode())
        self.stopping = self.stopping or why
        for training in list(self.running.values()):
            training.stop()

    def _start(self, claim: Claim) -> None:
        number, folder = claim.trial.number, self.trials.folder(claim.trial.number)
        params = draw(claim.trial, self.ranges)
        print(
            f"trial {number}: {'continues' if claim.again else 'begins'}: {shown(params)}",
            flush=True,
        )
        arguments = [*self.arguments, *self.shares, "--run-dir", str(folder)]
        arguments += as_arguments(params)
        try:
            parse(arguments)
        except ConfigError as error:
            self._record(claim, Outcome(TrialState.PRUNED, None, str(error), error.exit_code), 0.0)
            return
        slot = min(set(range(len(self.slots))) - self.running.keys())
        self.running[slot] = Training(claim, folder, arguments, self.ranks, self.slots[slot])
        if self.stopping:  # the signal came meanwhile
            self.running[slot].stop()

    def _poll(self) -> None:
        """Follows the running trials and records the results of those that have ended."""
        for slot, training in list(self.running.items()):
            self._follow(training)
            outcome = training.outcome()
            if outcome is None:
                continue
            del self.running[slot]
            if outcome.state == TrialState.RUNNING:
                training.claim.lock.close()
                print(f"trial {training.number}: stopped after saving", flush=True)
            else:
                self._record(training.claim, outcome, training.seconds)

    def _follow(self, training: Training) -> None:
        before = training.latest
        training.follow()
        now = time.monotonic()
        if training.latest != before and now - training.printed > LINE_SECONDS:
            training.printed = now
            step, top1 = training.latest or (0, 0.0)
            print(f"trial {training.number}: step {step}: top-1 {top1:.2f} %", flush=True)

    def _record(self, claim: Claim, outcome: Outcome, seconds: float) -> None:
        """Stores a result in the study and writes the table of all results. Raises `ConfigError` if
        all trials so far have ended with the same configuration error."""
        trial, study = claim.trial, self.trials.study
        with self.trials.locked():
            trial.set_user_attr("train_seconds", round(seconds, 1))
            if outcome.reason:
                trial.set_user_attr("reason", outcome.reason)
                trial.set_user_attr("exit_code", outcome.code)
            study.tell(trial, outcome.top1, outcome.state)
            trials = self.trials.all()
            self._write(trials)
        if outcome.state == TrialState.PRUNED:  # of no further use, and large
            shutil.rmtree(self.trials.folder(trial.number) / "checkpoints", ignore_errors=True)
        claim.lock.close()
        done = [one for one in trials if one.state in DONE]
        print(f"trial {trial.number}: {self._line(trials, outcome, seconds)}", flush=True)
        reasons = {one.user_attrs.get("reason") for one in done}
        codes = {one.user_attrs.get("exit_code") for one in done}
        if (
            len(done) >= min(ALIKE, self.most)
            and codes == {ConfigError.exit_code}
            and len(reasons) == 1
        ):
            raise ConfigError(f"every trial ends so: {outcome.reason}")

    def _line(self, trials: list[FrozenTrial], outcome: Outcome, seconds: float) -> str:
        result = {
            TrialState.COMPLETE: f"top-1 {outcome.top1 or 0.0:.2f} %",
            TrialState.PRUNED: outcome.reason if not outcome.code else f"refused: {outcome.reason}",
            TrialState.FAIL: f"failed: {outcome.reason}",
        }[outcome.state]
        best = best_first(trials)
        so_far = f" | best {best[0].value:.2f} % (trial {best[0].number})" if best else ""
        done = sum(one.state in DONE for one in trials)
        return f"{result} in {seconds:.0f} s of training{so_far} | {done}/{self.most} ended"

    def _write(self, trials: list[FrozenTrial]) -> None:
        """trials.csv and best.yaml; the caller has the lock."""
        out = self.trials.out
        with output_errors(out):
            write_csv(out / "trials.csv", trials, list(self.ranges))
            if best := best_first(trials):
                write_text(out / "best.yaml", as_yaml(self._best_config(best[0])))

    def _best_config(self, best: FrozenTrial) -> RunConfig:
        """With the whole pack, and without what only a trial needs."""
        own = [*self.arguments, "--run-dir", "RUN", *as_arguments(best.params)]
        config: RunConfig = replaced(parse(own), {"run_dir": "", "data.root": str(self.rec)})
        return config

    def _left(self) -> int:
        """Trials that have not ended."""
        return max(0, self.most - sum(trial.state in DONE for trial in self.trials.all()))

    def _summarize(self) -> None:
        trials, out, left = self.trials.all(), self.trials.out, self._left()
        if self.stopping:
            print(f"{self.stopping}: {counted(left, 'trial')} left; the same command continues")
        if not best_first(trials):
            if self.stopping:
                return
            raise ConfigError(f"no trial is complete: {out / 'trials.csv'} has the reasons")
        print(f"\n{table(trials, list(self.ranges), self.held_out)}\n")
        with self.trials.locked():
            self._write(trials)
            figures = draw_figures(self.trials.study, out / "figures")
        print(*(out / "best.yaml", out / "trials.csv", *figures), sep="\n")
        train = ["torchrun", f"--nproc-per-node={self.ranks}", "mpl_fast/train.py", "--config"]
        train += [str(out / "best.yaml"), "--data.root", str(self.rec), "--run-dir", "RUN"]
        print(f"train with it on all labeled images: {shlex.join(train)}")
        dashboard = ["optuna-dashboard", self.trials.storage.shown(out)]
        print(f"look at all trials: {shlex.join(dashboard)}", flush=True)
