"""The run directory: configuration, environment, metrics and summary of a run."""

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from mpl_fast import atomic, distributed
from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import METRIC_NAMES, current_options, renamed
from mpl_fast.config.command_line import as_yaml
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.learner import compilation
from mpl_fast.training.checkpoint import checkpoints_in
from mpl_fast.training.console import warn
from mpl_fast.training.curves import METRICS, checkpoint_seconds, read_rows, row_of
from mpl_fast.training.metrics import Row
from mpl_fast.training.status import LOCK, Status
from mpl_fast.untrusted import json_value, yaml_value

PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "numpy")
LOCK_SECONDS = 5.0
HELD_BACK = 1 << 20  # bytes of rows that wait in memory while metrics.jsonl cannot be written
# Options that may change when a run is resumed, since they do not change what its steps compute.
FREE_OPTIONS = {
    "run_dir",
    "lock",
    "log_every",
    "stop_at",
    "eval_every",
    "eval_epochs",
    "eval_batch",
}
FREE_OPTIONS |= {"checkpoint_every", "checkpoint_keep", "checkpoint_best", "patience"}
FREE_OPTIONS |= {"algorithm.teacher_graph", "on_spike", "spike_factor", "rollbacks"}
FREE_OPTIONS |= {"compile", "cuda_graphs", "grad_sync"}
FREE_OPTIONS |= {"data.root", "data.threads", "data.prefetch", "data.hw_decoder_load"}
IMAGE_OPTIONS = ("data.image_size", "data.mean", "data.std")


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
            self.commits = self._write_environment()
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
            self._rows.close()
            *lines, _ = file.read_bytes().split(b"\n")  # without what a kill has cut short
            kept = [line + b"\n" for line in map(partial(_kept, step), lines) if line is not None]
            (self.path / "summary.json").unlink(missing_ok=True)
            atomic.write_text(self._config_file, self._config)
            atomic.write_bytes(file, b"".join(kept))
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
        with output_errors(self.path / METRICS):
            self._rows.write((json.dumps({"step": step, **values}) + "\n").encode())
        self._write_rows()
        self._curves("row", step, values)

    def event(self, step: int, name: str, **values: Any) -> None:
        """Appends to metrics.jsonl what happened after so many steps, with the time."""
        event = {"step": step, "event": name, "time": round(time.time(), 3), **values}
        with output_errors(self.path / METRICS):
            self._rows.write((json.dumps(event) + "\n").encode())
        self._write_rows()

    def end(self, state: str, error: str = "") -> None:
        """Writes how the run ended (`Status.end`)."""
        self.status.end(state, error)
        self.event(self.status.step, state, **({"error": error} if error else {}))

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
        try:
            content = json_value((self.path / "summary.json").read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict):
            return None
        found = renamed(content, METRIC_NAMES)
        return found if isinstance(found.get("top1"), int | float) else None

    def other_commit(self) -> str:
        """A warning if the session before had another git commit, or an empty text."""
        before, now = self.commits
        if not before or not now or before == now:
            return ""
        return f"resumed with another program: the git commit was {before} and is {now}"

    def _write_environment(self) -> tuple[Any, Any]:
        """Adds this session to env.json; returns the git commits of the one before and of this."""
        file = self.path / "env.json"
        sessions, present = _sessions(file), environment()
        atomic.write_json(file, present | {"earlier_sessions": sessions})
        before = sessions[-1].get("git_commit") if sessions else None
        return before, present["git_commit"]


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


def _sessions(file: Path) -> list[Any]:
    """Earlier sessions listed in env.json, oldest first; none if the file is unreadable."""
    try:
        latest = json_value(file.read_bytes())
        return [*latest.pop("earlier_sessions"), latest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _kept(step: int, line: bytes) -> bytes | None:
    """A line of metrics.jsonl, with a row under present names; None for a row of a later step."""
    row = row_of(line)
    if row is None:
        return line
    return json.dumps(renamed(row, METRIC_NAMES)).encode() if row["step"] <= step else None


def environment() -> dict[str, Any]:
    """Versions, devices and git commit: what a result depends on besides its config."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **_versions(),
            "cuda": torch.version.cuda,
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [f"CPU ({platform.machine()}, {os.cpu_count()} cores)"],
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": _commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of this file's checkout, ending in -dirty if files were changed since."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _locked(path: Path, *, lock: bool) -> Any:
    """Creates the folder and locks it; the system releases the lock when this process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a")
    except OSError as error:
        reason = "is a file" if path.is_file() else error.strerror
        raise ConfigError(f"run_dir {path} cannot be written: {reason}") from None
    if not lock:
        return file
    for _ in range(int(LOCK_SECONDS / 0.1)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.1)  # a run that was just killed may still be ending
        except OSError as error:
            raise ConfigError(
                f"run_dir {path} cannot be locked: {error.strerror}: mount its file system with "
                "flock (Lustre: -o flock), use another --run-dir, or, if no other run can be "
                "writing there, give --lock false"
            ) from None
    raise ConfigError(f"run_dir {path} is in use by another run: stop it, or use another --run-dir")


def check_same_config(file: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if a run directory with checkpoints has another config, or if its
    checkpoints are gone.

    `FREE_OPTIONS` may differ, and a start around the run directory, which moves with it.
    """
    folder = file.parent / CHECKPOINTS["newest"]
    if not checkpoints_in(folder):
        _check_none_lost(file, folder, config)
        return
    if not file.exists():
        return
    old, new = _old_and_new(file, config)
    start = new.get("algorithm.start")
    around = {"algorithm.start"} if start and Path(start) == Path(config.run_dir).parent else set()
    free = FREE_OPTIONS | around
    keys = [k for k in {**old, **new} if k not in free and old.get(k) != new.get(k)]
    if keys:
        changes = (f"{k} was {_shown(old, k)} and is {_shown(new, k)}" for k in keys)
        shown = first_few(changes, 5)
        raise ConfigError(f"{file.parent} holds another run: {shown}; use another --run-dir")


def _check_none_lost(file: Path, folder: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if the checkpoints of an earlier run are gone, whose metrics a new one
    would replace. A run that was killed before its first checkpoint begins again."""
    run, metrics = file.parent, file.with_name("metrics.jsonl")
    step = max((row["step"] for row in read_rows(metrics)), default=-1) if metrics.exists() else -1
    every = _old_and_new(file, config)[0]["checkpoint_every"] if file.exists() else 0
    # Before any is complete, a run ends when it is killed during the first save, or when the first
    # two have failed, which it finds when the third is due at the latest.
    lost = step >= 0 and (not folder.is_dir() or 0 < 3 * every < step)
    if (run / "summary.json").exists():
        what = "summary.json"
    elif lost:
        what = f"metrics.jsonl up to step {step}"
    else:
        return
    raise ConfigError(
        f"{run} has the {what} of an earlier run, and {folder} holds no checkpoint of it: put its "
        "checkpoints back to resume it, or use another --run-dir"
    )


def other_images(start: str, config: RunConfig) -> str:
    """A warning if the run in folder `start` was trained on images of another size or
    normalization than the config has, or an empty text."""
    file = Path(start) / "config.yaml"
    if not file.exists():
        return ""
    old, new = _old_and_new(file, config)
    shown = ", ".join(
        f"{key} was {old[key]} and is {new[key]}" for key in IMAGE_OPTIONS if old[key] != new[key]
    )
    return shown and f"{start} was trained on other images: {shown}; give its values if not meant"


def _old_and_new(file: Path, config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options in the config.yaml of a run and those of `config`, by dotted key.

    An option that did not exist when the run began had the value that is its default now.
    """
    defaults, new = (
        _flat(yaml.safe_load(as_yaml(c)))
        for c in (RunConfig(algorithm=type(config.algorithm)()), config)
    )
    return defaults | current_options(_flat(_tree(file))), new


def _tree(file: Path) -> dict[str, Any]:
    """A run's config.yaml. Raises `ConfigError` if it is damaged."""
    try:
        tree = yaml_value(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{file} is damaged: it holds no keys and values")
    return tree


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values.get(key)) or '""'


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = str(name)  # in a damaged file it may be anything
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        leaves |= inner
    return leaves
