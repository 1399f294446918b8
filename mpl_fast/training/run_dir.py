"""The run directory: configuration, environment, metrics and summary of a run."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mpl_fast import atomic, distributed, locks
from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import METRIC_NAMES, renamed
from mpl_fast.config.command_line import as_yaml
from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from mpl_fast.learner import compilation
from mpl_fast.training import environment
from mpl_fast.training.console import warn
from mpl_fast.training.curves import METRICS, checkpoint_seconds, read_summary, row_of
from mpl_fast.training.metrics import Row
from mpl_fast.training.same_config import check_same_config
from mpl_fast.training.status import LOCK, Status

LOCK_SECONDS = 5.0
HELD_BACK = 1 << 20  # bytes of rows that wait in memory while metrics.jsonl cannot be written


class RunDir:
    """Writes a run's files. Exists on rank 0 only.

    Raises `OutputError` if they cannot be written as a run begins or ends. In between, rows wait in
    memory until metrics.jsonl can be written again, and curves end, each with one warning.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run_dir)
        self._lock = _locked(self.path, lock=config.lock)
        self._config_file, self._config = self.path / "config.yaml", as_yaml(config)
        check_same_config(self._config_file, config)
        with output_errors(self.path):
            if not self._config_file.exists():
                atomic.write_text(self._config_file, self._config)
            self.other_commit = environment.record(self.path / "env.json")
            """A warning if the session before had another git commit, or an empty text."""
            self._rows = self._open_rows()
        self.status = Status(self.path, config.recipe, config.steps)
        self._board: Any = None
        self._waiting = False

    def close(self) -> None:
        """Syncs all files to disk and releases the lock of the folder."""
        self._curves("close")
        try:
            with output_errors(self.path / METRICS), self._rows:
                self._rows.flush()
                os.fsync(self._rows.fileno())
        finally:
            self._lock.close()

    def resume_at(self, step: int) -> None:
        """Writes the config, now that it is known to fit the checkpoint, and drops rows that an
        interrupted run wrote after it, so that no step is there twice, and the summary of a run
        that continues."""
        file = self.path / METRICS
        with output_errors(self.path):
            self._rows.flush()
            *lines, _ = file.read_bytes().split(b"\n")  # without what a kill has cut short
            kept = [line + b"\n" for line in map(partial(_kept, step), lines) if line is not None]
            (self.path / "summary.json").unlink(missing_ok=True)
            atomic.write_text(self._config_file, self._config)
            atomic.write_bytes(file, b"".join(kept))
            self._rows.close()  # not before: the reason of a failure is a row, too
            self._rows = self._open_rows()
        self._curves("close")  # of before a rollback
        self._open_curves(step + 1)

    def _open_rows(self) -> BinaryIO:
        return (self.path / METRICS).open("ab", buffering=HELD_BACK)

    def _open_curves(self, step: int) -> None:
        from mpl_fast.training.tensorboard import Board  # takes seconds to import

        try:
            self._board = Board(self.path / "tensorboard", step)
        except OSError as error:
            self._no_curves(error)

    def _curves(self, method: str, *arguments: Any) -> None:
        """Calls a method of the curves, if there are any; they are optional."""
        board = self._board  # another thread may call `sync`
        try:
            if board is not None:
                getattr(board, method)(*arguments)
        except OSError as error:
            self._no_curves(error)

    def _no_curves(self, error: OSError) -> None:
        self._board = None
        warn(
            f"{self.path}/tensorboard cannot be written ({error.strerror}): no curves are drawn "
            f"until the run is resumed; {METRICS} has all rows"
        )

    def row(self, step: int, values: Row) -> None:
        """Appends a line to metrics.jsonl and a point to each TensorBoard curve; `step` is the
        number of steps done."""
        self._append({"step": step, **values})
        self._curves("row", step, values)

    def event(self, step: int, name: str, **values: Any) -> None:
        """Appends to metrics.jsonl what happened after so many steps, with the time."""
        self._append({"step": step, "event": name, "time": round(time.time(), 3), **values})

    def end(self, state: str, error: str = "") -> None:
        """Writes how the run ended (`Status.end`)."""
        self.status.end(state, error)
        self.event(self.status.step, state, **({"error": error} if error else {}))

    def _append(self, values: dict[str, Any]) -> None:
        with output_errors(self.path / METRICS):
            self._rows.write((json.dumps(values) + "\n").encode())
        self._write_rows()

    def _write_rows(self, *, sync: bool = False) -> None:
        """Writes the rows in memory; those that cannot be written stay there for the next call."""
        try:
            self._rows.flush()
            if sync:
                os.fsync(self._rows.fileno())
            self._waiting = False
        except OSError as error:
            if not self._waiting:
                warn(
                    f"{self.path / METRICS} cannot be written ({error.strerror}): its rows wait in "
                    "memory"
                )
            self._waiting = True

    def sync(self) -> None:
        """Syncs the rows written so far to disk."""
        self._write_rows(sync=True)
        self._curves("flush")

    def summarize(self, values: dict[str, Any]) -> None:
        """Writes summary.json, with the time of saves besides that of training."""
        with output_errors(self.path):
            saves = {"checkpoint_seconds": round(checkpoint_seconds(self.path / METRICS), 3)}
            atomic.write_json(self.path / "summary.json", values | saves)

    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json, or None if the run has not ended or it is damaged."""
        return read_summary(self.path) or None


def open_for(config: RunConfig, dist_env: distributed.DistEnv) -> RunDir | None:
    """Opens the run directory on rank 0; returns None on other ranks.

    A collective. Every rank raises the `UserError` that rank 0 raised.
    """
    folder, failure = None, None
    if dist_env.is_rank0:
        try:
            folder = RunDir(config)
        except UserError as error:
            failure = error
    if failure := distributed.broadcast_object(failure):
        raise failure
    if not all(distributed.all_gather_object((Path(config.run_dir) / "config.yaml").exists())):
        raise ConfigError(
            f"run_dir {config.run_dir} is not the same folder for all ranks: "
            "give a path on a file system that all machines share"
        )
    return folder


@contextmanager
def closing(run_dir: RunDir | None) -> Iterator[None]:
    """Closes a run directory at the end, and writes to it why the run failed, if it did."""
    try:
        yield
    except BaseException as error:
        if run_dir:
            with suppress(OutputError):  # what ends the run is the first error
                run_dir.end("failed", _reason(error))
                run_dir.close()
        raise
    if run_dir:
        run_dir.close()


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def keep_compile_cache(config: RunConfig) -> None:
    """Keeps compiled kernels in the run directory, so that the next start compiles nothing."""
    if config.compile != "off":
        compilation.set_cache_dirs(Path(config.run_dir) / "compile_cache")


def _kept(step: int, line: bytes) -> bytes | None:
    """A line of metrics.jsonl, with a row under present names; None for a row of a later step."""
    row = row_of(line)
    if row is None:
        return line
    return json.dumps(renamed(row, METRIC_NAMES)).encode() if row["step"] <= step else None


def _locked(path: Path, *, lock: bool) -> Any:
    """Creates the folder and locks it; the system releases the lock when this process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a")
    except OSError as error:
        reason = "is a file" if path.is_file() else error.strerror
        raise ConfigError(f"run_dir {path} cannot be written: {reason}") from None
    # A run that was just killed may still be ending.
    if not lock or locks.lock(file, path, seconds=LOCK_SECONDS):
        return file
    raise ConfigError(f"run_dir {path} is in use by another run: stop it, or use another --run-dir")
