"""The trials of a sweep: Optuna's study, and which worker has which trial.

A worker is a process of tools/sweep.py. It holds the lock of each of its trials, which the system
releases when the worker and the processes of the trial have ended, however they ended: a running
trial without a lock is continued by the next worker that is free. So no trial needs a second one
in its place, and a study of N trials has N numbers.
"""

import json
import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from mpl_fast import locks
from mpl_fast.atomic import write_json
from mpl_fast.errors import ConfigError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.untrusted import json_value

SETTINGS = "sweep.json"
FREE = ("study", "config.lock")  # keys there that may differ: the study's name, and --lock
LOCK_SECONDS = 60.0  # that SQLite waits for another process
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def pruner(name: str, first: int, last: int) -> BasePruner:
    """Optuna's pruner; `first` and `last` are the steps of a trial's first and last evaluation, 0
    where they differ between trials."""
    if name == "hyperband":
        return HyperbandPruner(min_resource=first or 1, max_resource=last or "auto")
    return MedianPruner() if name == "median" else NopPruner()


class Claim(NamedTuple):
    """A trial that this worker has."""

    trial: optuna.Trial
    lock: IO[str]  # open, and so locked
    again: bool  # another worker began it


class Storage(NamedTuple):
    """Where a study is stored."""

    place: str  # sqlite, journal, or the URL of a database

    def open(self, out: Path) -> BaseStorage:
        """Raises `ConfigError` for a database that cannot be used."""
        if self.place == "journal":
            return JournalStorage(JournalFileBackend(str(out / "journal.log")))
        waits = {"connect_args": {"timeout": LOCK_SECONDS}} if self.place == "sqlite" else {}
        try:
            return RDBStorage(self.url(out), engine_kwargs=waits)
        except (SQLAlchemyError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            hint = "; without locks, give --storage journal" if self.place == "sqlite" else ""
            raise ConfigError(
                f"--storage {self.shown(out)} cannot be used: {reason}{hint}"
            ) from None

    def url(self, out: Path) -> str:
        """For Optuna and its dashboard."""
        if self.place == "journal":
            return str(out / "journal.log")
        return f"sqlite:///{out / 'sweep.db'}" if self.place == "sqlite" else self.place

    def shown(self, out: Path) -> str:
        """The same without a password."""
        url = self.url(out)
        if self.place in ("sqlite", "journal"):
            return url
        try:
            return make_url(url).render_as_string()
        except SQLAlchemyError:
            raise ConfigError("--storage: give sqlite, journal or the URL of a database") from None


class Trials:
    """The study in a folder that all workers share, and the trials of this worker.

    Without `lock` there must be no other worker.
    """

    def __init__(
        self, out: Path, storage: Storage, pruner: BasePruner, seed: int, *, lock: bool = True
    ) -> None:
        self.out, self.storage, self._pruner, self._seed = out, storage, pruner, seed
        self._locks, self._own = lock, dict[int, IO[str]]()
        self.study: optuna.Study

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One worker at a time draws trials and writes results."""
        with output_errors(self.out), (self.out / ".lock").open("a") as lock:
            if self._locks:
                locks.lock(lock, self.out, seconds=math.inf)
            yield

    def open(
        self,
        settings: Mapping[str, Any],
        own: Mapping[str, Any],
        prepare: Callable[[], None],
        defaults: Mapping[str, Any],
    ) -> bool:
        """Opens the study; returns whether it is a new one, for which `prepare` is called and whose
        first trial has the `own` values.

        `defaults`: of settings, for those that did not exist when the study began. Raises
        `ConfigError` if the folder has a sweep of other settings. The caller has the lock.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        file = self.out / SETTINGS
        new = not file.exists()
        stored = dict(settings) if new else _same(file, settings, defaults)
        name = stored.setdefault("study", f"{self.out.name}-{secrets.token_hex(4)}")
        storage = self.storage.open(self.out)
        if new:
            prepare()
            write_json(file, stored)
        self.study = optuna.create_study(
            storage=storage,
            pruner=self._pruner,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        self.study.set_metric_names(["top-1"])
        if not self.all():
            self.study.enqueue_trial(dict(own))
        return new

    def all(self) -> list[FrozenTrial]:
        """Every trial, by number."""
        return sorted(self.study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    def folder(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.out / "trials" / f"{number:04d}"

    def claim(self, most: int) -> Claim | None:
        """A trial that has no worker, or a new one if there are fewer than `most`; else None.

        Results are stored under the lock, too, so a running trial has none yet.
        """
        with self.locked():
            trials = self.all()
            for trial in trials:
                if trial.state == TrialState.RUNNING and (lock := self._lock(trial.number)):
                    return Claim(optuna.Trial(self.study, trial._trial_id), lock, again=True)
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            if not waiting and len(trials) >= most:
                return None
            # Seeded by the number: a sweep that is run again must not repeat its first draws.
            number = waiting[0].number if waiting else len(trials)
            seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            new = self.study.ask()
            lock = self._lock(new.number)
            assert lock  # nobody else knows its number
            return Claim(new, lock, again=False)

    def _lock(self, number: int) -> IO[str] | None:
        """The lock of a trial, or None while another worker, or its last process, has it."""
        folder = self.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".worker").open("a")
        own = self._own.get(number)
        free = locks.lock(lock, folder) if self._locks else own is None or own.closed
        if not free:
            lock.close()
            return None
        self._own[number] = lock
        return lock


def _same(file: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings, which must equal the given ones but for those that are `FREE`."""
    try:
        stored: dict[str, Any] = json_value(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error}); use another --out") from None
    old = _flat(defaults) | _flat(stored)
    new = _flat(json.loads(json.dumps(settings)))
    keys = [key for key in {**old, **new} if key not in FREE]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if changed:
        what = first_few((f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed), 3)
        raise ConfigError(f"{file.parent} holds another sweep: {what}; use another --out")
    return stored


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {prefix + key: value}
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else inner
    return leaves
