"""status.json of a run directory: how far the run is and how it ended; and a table of runs.

Rank 0 writes it every few seconds. Imports no torch, so that the table is quick.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast import atomic, locks
from mpl_fast.errors import DataError, OutputError
from mpl_fast.training.console import duration, warn
from mpl_fast.training.curves import METRICS, read_rows
from mpl_fast.untrusted import json_object, yaml_object

STATUS, LOCK = "status.json", ".lock"  # in a run directory
SECONDS = 10.0  # between two writes
OLD_SECONDS = 120.0  # without a write: this is then shown
COLUMNS = ("run", "recipe", "step", "images/s", "ETA", "top-1", "state")
Json = dict[str, Any]


class Status:
    """Writes status.json; an error is one warning, and the run goes on."""

    def __init__(self, folder: Path, recipe: str, steps: int) -> None:
        self._file = folder / STATUS
        self._values: Json = {
            "state": "running",
            "recipe": recipe,
            "step": 0,
            "steps": steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._written_at, self._failed = -SECONDS, False

    def update(self, **values: float) -> None:
        """Writes values, such as `step`, the number of steps done, at most every `SECONDS`."""
        self._values |= values
        if time.monotonic() - self._written_at >= SECONDS:
            self._write()

    @property
    def step(self) -> int:
        """The number of steps done when it was updated last."""
        return int(self._values["step"])

    def end(self, state: str, error: str = "") -> None:
        """Writes how the run ended, complete, paused, stopped or failed with an error."""
        self._values |= {"state": state, **({"error": error} if error else {})}
        self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        try:
            atomic.replace_text(self._file, json.dumps({**self._values, "time": time.time()}))
        except OSError as error:
            if not self._failed:
                warn(f"{self._file} cannot be written ({error.strerror}): it is behind the run")
            self._failed = True


class Run(NamedTuple):
    """What the table has of a run."""

    path: Path
    recipe: str
    step: int
    steps: int
    images_per_second: float | None
    eta_seconds: float | None
    top1: float | None
    state: str
    """running, complete, paused, stopped, failed, dead, or unknown."""
    error: str
    """The last error, or since when nothing was written."""

    def cells(self) -> list[str]:
        """As text, in the order of `COLUMNS`."""
        ends = self.eta_seconds is not None and self.state == "running"
        return [
            str(self.path).encode(errors="backslashreplace").decode(),
            self.recipe,
            f"{self.step}/{self.steps}",
            f"{self.images_per_second:.0f}" if self.images_per_second else "",
            duration(self.eta_seconds or 0.0) if ends else "",
            f"{self.top1:.2f} %" if self.top1 is not None else "",
            f"{self.state}: {self.error}" if self.error else self.state,
        ]


def table(folders: Sequence[Path]) -> str:
    """A line for each run. Raises `DataError` for a folder that neither is a run nor has some."""
    rows = [list(COLUMNS), *(read(run).cells() for folder in folders for run in runs_in(folder))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def runs_in(folder: Path) -> list[Path]:
    """A run and the one that may follow it inside, or all runs of a folder of runs."""
    inside = sorted(file.parent for file in folder.glob("*/config.yaml"))
    found = _phases(folder) or [run for one in inside for run in _phases(one)]
    if not found:
        deeper = sorted({str(file.parent.parent) for file in folder.glob("*/*/config.yaml")})
        such = f", such as {deeper[0]}" if deeper else ""
        raise DataError(
            f"{folder} has no config.yaml: name run directories, or a folder of them{such}"
        )
    return found


def _phases(folder: Path) -> list[Path]:
    """A run and the one that may follow it inside; of a sweep, those of its trials."""
    if (folder / "sweep.json").exists():
        return sorted(file.parent for file in folder.glob("trials/*/config.yaml"))
    return [run for run in (folder, folder / "finetune") if (run / "config.yaml").exists()]


def read(folder: Path) -> Run:
    """The status of a run, from other files too: a run of an older version has no status.json."""
    values, last = json_object(folder / STATUS), _last(folder)
    config = yaml_object(folder / "config.yaml")
    done = (folder / "summary.json").exists()
    state = _text(values, "state") or ("complete" if done else "unknown")
    error, silent = _text(values, "error"), time.time() - _number(values, "time", time.time())
    # Some file systems have no locks, or each machine its own.
    here = values.get("host") == socket.gethostname()
    ended = not _exists(values.get("pid")) if here else silent > OLD_SECONDS
    if state == "running" and ended and not _locked(folder):
        state, error = "dead", f"its process is gone, last written {duration(silent)} ago"
    elif state == "running" and silent > OLD_SECONDS:
        error = f"no step for {duration(silent)}"
    return Run(
        path=folder,
        recipe=_text(config, "recipe") or "?",
        # status.json is written now and then: of a run that died, rows of metrics may be newer.
        step=int(max(_number(values, "step", 0), last.get("step", 0))),
        steps=int(_number(values, "steps", _number(config, "steps", 0))),
        images_per_second=_maybe(values, "images_per_second", last.get("images_per_second")),
        eta_seconds=_maybe(values, "eta_seconds"),
        top1=_maybe(values, "top1", last.get("eval/top1")),
        state=state,
        error=error,
    )


def _last(folder: Path) -> Json:
    """The last value of each metric."""
    try:
        return {name: value for row in read_rows(folder / METRICS) for name, value in row.items()}
    except DataError:
        return {}


def _locked(folder: Path) -> bool:
    """Whether a process certainly trains in the folder."""
    try:
        with (folder / LOCK).open("rb") as lock:
            return not locks.lock(lock, folder, shared=True)
    except (OSError, OutputError):
        return False


def _exists(pid: object) -> bool:
    """Whether a process of this number runs: one that has ended and that nobody waits for, as in a
    container without an init process, keeps its number."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return True
    except (OSError, OverflowError):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:  # another system than Linux
        return True


def _text(values: Json, name: str) -> str:
    value = values.get(name)
    return " ".join(value.split()) if isinstance(value, str) else ""


def _number(values: Json, name: str, default: float) -> float:
    found = _maybe(values, name)
    return default if found is None else found


def _maybe(values: Json, name: str, default: float | None = None) -> float | None:
    value = values.get(name)
    if isinstance(value, int | float) and abs(value) < 1e15:  # NaN is not
        return value
    return default
