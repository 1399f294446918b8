"""The run directory: what was asked for, on what machine, and everything that came out."""

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

from mpl_fast import distributed
from mpl_fast.config import RunConfig
from mpl_fast.config.command_line import as_yaml
from mpl_fast.errors import ConfigError, UserError
from mpl_fast.training.metrics import Row

PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "numpy")
LOCK_SECONDS = 5.0
# Keys that may change when a run is resumed, for they do not change its result.
FREE = {"run_dir", "log_every", "checkpoint_every", "checkpoint_keep", "eval_every", "eval_batch"}
FREE |= {
    "eval_epochs",
    "stop_at",
    "cuda_graphs",
    "grad_sync",
    "compile",
    "algorithm.teacher_graph",
    "data.root",
    "data.threads",
    "data.prefetch",
    "data.hw_decoder_load",
}


class RunDir:
    """Writes a run's files; only rank 0 has one."""

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run_dir)
        self._lock = _locked(self.path)
        _agree(self.path / "config.yaml", config)
        _replace(self.path / "config.yaml", as_yaml(config))
        self._write_environment()
        self._rows = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None

    def close(self) -> None:
        """Makes everything durable and frees the folder for another run."""
        self.sync()
        self._rows.close()
        if self._board is not None:
            self._board.close()
        self._lock.close()

    def resume_at(self, step: int) -> None:
        """Drops rows that an interrupted run wrote after the checkpoint, so that no step stands
        twice."""
        file = self.path / "metrics.jsonl"
        self._rows.close()
        kept = [r for r in _readable_rows(file) if r["step"] <= step]
        _replace(file, "".join(json.dumps(r) + "\n" for r in kept))
        self._rows = file.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # takes seconds to import

        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def row(self, step: int, values: Row) -> None:
        """One line of metrics.jsonl and one point of each TensorBoard curve; `step` is steps
        done."""
        self._rows.write(json.dumps({"step": step, **values}) + "\n")
        self._rows.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Makes the rows so far durable."""
        self._rows.flush()
        os.fsync(self._rows.fileno())
        if self._board is not None:
            self._board.flush()

    def summarize(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        _replace(self.path / "summary.json", json.dumps(values, indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a run that has ended, if this one has."""
        file = self.path / "summary.json"
        found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return found

    def _write_environment(self) -> None:
        file = self.path / "env.json"
        sessions = _sessions(file) if file.exists() else []
        _replace(file, json.dumps(environment() | {"earlier_sessions": sessions}, indent=1) + "\n")


def open_for(config: RunConfig, dist_env: distributed.DistEnv) -> RunDir | None:
    """The run directory on rank 0; its refusal reaches every rank as the `ConfigError` it is."""
    folder, refusal = None, None
    if dist_env.is_first:
        try:
            folder = RunDir(config)
        except UserError as error:
            refusal = error
    if refusal := distributed.from_first(refusal):
        raise refusal
    if not all(distributed.gather((Path(config.run_dir) / "config.yaml").exists())):
        raise ConfigError(
            f"run_dir {config.run_dir} is not the same folder for all ranks: "
            "give a path on a file system that all machines share"
        )
    return folder


def _sessions(file: Path) -> list[Any]:
    """What env.json knows of earlier sessions; a file that a user spoilt is no reason to stop."""
    try:
        latest = json.loads(file.read_text())
        return [*latest.pop("earlier_sessions"), latest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def environment() -> dict[str, Any]:
    """Versions, devices and the commit of the code: what a result depends on besides its config."""
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
    """Commit of the checkout that this file lies in, marked if it has been changed since."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _locked(path: Path) -> Any:
    """Creates the folder and takes its lock, which the system frees when this process ends."""
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
        except OSError:
            time.sleep(0.1)  # a run that was just killed needs a moment to vanish
    raise ConfigError(f"run_dir {path} is in use by another run: stop it, or use another --run-dir")


def _agree(file: Path, config: RunConfig) -> None:
    """A run directory belongs to one config, but for the keys that do not matter to the result.

    Until there is a checkpoint there is nothing to protect, and a mistake may be mended in place.
    A key that did not exist when the run began had what is now its default.
    """
    if not file.exists() or not list(file.parent.glob("checkpoints/step_*")):
        return
    old, new = _flat(yaml.safe_load(file.read_text()) or {}), _flat(yaml.safe_load(as_yaml(config)))
    old = _flat(yaml.safe_load(as_yaml(RunConfig(algorithm=type(config.algorithm)())))) | old
    keys = [k for k in {**old, **new} if k not in FREE and old.get(k) != new.get(k)]
    if keys:
        shown = ", ".join(f"{k} was {old.get(k)} and is {new.get(k)}" for k in keys[:5])
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise ConfigError(f"{file.parent} holds another run: {shown}{more}; use another --run-dir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        leaves |= inner
    return leaves


def _readable_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file whose last line a kill may have cut short."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _replace(file: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.rename(file)
