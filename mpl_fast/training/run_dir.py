"""The run directory: configuration, environment, metrics and summary of a run."""

import fcntl
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from mpl_fast import atomic, distributed
from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import METRIC_NAMES, current_options, renamed
from mpl_fast.config.command_line import as_yaml
from mpl_fast.errors import ConfigError, UserError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.learner import compilation
from mpl_fast.training.curves import read_rows
from mpl_fast.training.metrics import Row
from mpl_fast.untrusted import json_value, yaml_value

PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "numpy")
LOCK_SECONDS = 5.0
# Options that may change when a run is resumed, since they do not change what its steps compute.
FREE_OPTIONS = {"run_dir", "log_every", "stop_at", "eval_every", "eval_epochs", "eval_batch"}
FREE_OPTIONS |= {"checkpoint_every", "checkpoint_keep", "checkpoint_best", "patience"}
FREE_OPTIONS |= {"algorithm.teacher_graph"}
FREE_OPTIONS |= {"compile", "cuda_graphs", "grad_sync"}
FREE_OPTIONS |= {"data.root", "data.threads", "data.prefetch", "data.hw_decoder_load"}
IMAGE_OPTIONS = ("data.image_size", "data.mean", "data.std")


class RunDir:
    """Writes a run's files. Exists on rank 0 only. Raises `OutputError` on a full disk."""

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run_dir)
        self._lock = _locked(self.path)
        self._config_file, self._config = self.path / "config.yaml", as_yaml(config)
        check_same_config(self._config_file, config)
        with output_errors(self.path):
            if not self._config_file.exists():
                atomic.write_text(self._config_file, self._config)
            self._write_environment()
            self._rows = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None

    def close(self) -> None:
        """Syncs all files to disk and releases the lock of the folder."""
        self.sync()
        with output_errors(self.path):
            self._rows.close()
            if self._board is not None:
                self._board.close()
        self._lock.close()

    def resume_at(self, step: int) -> None:
        """Writes the config, now that it is known to fit the checkpoint, and drops rows that an
        interrupted run wrote after it, so that no step is there twice, and the summary of a run
        that continues."""
        file = self.path / "metrics.jsonl"
        self._rows.close()
        kept = [r for r in read_rows(file) if r["step"] <= step]
        from mpl_fast.training.tensorboard import Board  # takes seconds to import

        with output_errors(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)
            atomic.write_text(self._config_file, self._config)
            atomic.write_text(file, "".join(json.dumps(r) + "\n" for r in kept))
            self._rows = file.open("a", encoding="utf-8")
            self._board = Board(self.path / "tensorboard", step + 1)

    def row(self, step: int, values: Row) -> None:
        """Appends a line to metrics.jsonl and a point to each TensorBoard curve; `step` is the
        number of steps done."""
        with output_errors(self.path):
            self._rows.write(json.dumps({"step": step, **values}) + "\n")
            self._rows.flush()
            self._board.row(step, values)

    def sync(self) -> None:
        """Syncs the rows written so far to disk."""
        with output_errors(self.path):
            self._rows.flush()
            os.fsync(self._rows.fileno())
            if self._board is not None:
                self._board.flush()

    def summarize(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        with output_errors(self.path):
            atomic.write_json(self.path / "summary.json", values)

    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json, or None if the run has not ended."""
        file = self.path / "summary.json"
        return renamed(json.loads(file.read_text()), METRIC_NAMES) if file.exists() else None

    def _write_environment(self) -> None:
        file = self.path / "env.json"
        sessions = _sessions(file) if file.exists() else []
        atomic.write_json(file, environment() | {"earlier_sessions": sessions})


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


def keep_compile_cache(config: RunConfig) -> None:
    """Keeps compiled kernels in the run directory, so that the next start compiles nothing."""
    if config.compile != "off":
        compilation.set_cache_dirs(Path(config.run_dir) / "compile_cache")


def _sessions(file: Path) -> list[Any]:
    """Earlier sessions listed in env.json; none if the file is unreadable."""
    try:
        latest = json_value(file.read_text())
        return [*latest.pop("earlier_sessions"), latest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


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


def _locked(path: Path) -> Any:
    """Creates the folder and locks it; the system releases the lock when this process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        reason = "is a file" if path.is_file() else error.strerror
        raise ConfigError(f"run_dir {path} cannot be written: {reason}") from None
    for _ in range(int(LOCK_SECONDS / 0.1)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.1)  # a run that was just killed may still be ending
        except OSError as error:
            raise ConfigError(
                f"run_dir {path} cannot be locked: {error.strerror}: mount its file system with "
                "flock (Lustre: -o flock), or use another --run-dir"
            ) from None
    raise ConfigError(f"run_dir {path} is in use by another run: stop it, or use another --run-dir")


def check_same_config(file: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if a run directory with checkpoints has another config.

    `FREE_OPTIONS` may differ, and a start around the run directory, which moves with it.
    """
    if not file.exists() or not list(file.parent.glob("checkpoints/step_*")):
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
    try:
        tree = yaml_value(file)
        if not isinstance(tree, dict):
            raise ValueError(f"{file} is not YAML of keys and values")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return defaults | current_options(_flat(tree)), new


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values.get(key)) or '""'


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        leaves |= inner
    return leaves
