"""Checkpoints that a power cut cannot spoil: written aside, synced, checksummed, then renamed.

A checkpoint is a folder ``step_00001000/`` with ``state.pt`` (what all ranks share), one
``rank_0.pt``
for each rank (random generators, data position) and ``checkpoint.json`` with size and SHA-256
of each.
torch.load does not notice a flipped bit, so the checksum is what tells a good file.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from mpl_fast.algorithms.base import Algorithm
from mpl_fast.config import FinetuneConfig
from mpl_fast.distributed import DistEnv, barrier, from_first, gather
from mpl_fast.errors import CheckpointError, ConfigError
from mpl_fast.learner import Learner

FORMAT = "mpl_fast.training.checkpoint/1"


class Checkpoints:
    """The newest few checkpoints of a run."""

    def __init__(self, folder: Path, *, keep: int, rank: int, world: int) -> None:
        self.folder, self.keep, self.rank, self.world = folder, keep, rank, world
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None
            for leftover in folder.glob(".writing_*"):
                shutil.rmtree(leftover)

    def save(self, step: int, shared: dict[str, Any], mine: dict[str, Any]) -> Path:
        """Writes what all ranks share (rank 0's is taken) and what is each rank's own.

        Every rank must call it. Either the whole checkpoint appears under its final name, or
        nothing.
        """
        aside, final = self.folder / f".writing_{step:08d}", self.folder / f"step_{step:08d}"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        barrier()
        files = {f"rank_{self.rank}.pt": mine} | ({"state.pt": shared} if self.rank == 0 else {})
        written = {name: _write(aside / name, partial(torch.save, v)) for name, v in files.items()}
        everyones = gather(written)
        if self.rank == 0:
            about = {"format": FORMAT, "step": step, "world": self.world}
            about["files"] = {name: facts for part in everyones for name, facts in part.items()}
            text = json.dumps(about, indent=1).encode()
            _write(aside / "checkpoint.json", lambda file: file.write(text))
            _sync_folder(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _sync_folder(self.folder)
            # A newer one can only be damaged: this run has fallen back behind it.
            steps = [s for s in _steps(self.folder) if s.name <= final.name]
            for old in {*_steps(self.folder)} - {*steps[-self.keep :]}:
                shutil.rmtree(old)
        barrier()
        return final

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, and a warning for each damaged one passed over.

        Raises `CheckpointError` if there are checkpoints but none can be used.
        """
        found, damage = from_first(newest(self.folder) if self.rank == 0 else None)
        if found is None and damage:
            raise CheckpointError(
                f"no usable checkpoint: {'; '.join(damage)}; use another --run-dir"
            )
        return found, damage

    def load(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all ranks share, and what is this rank's own."""
        world = json.loads((checkpoint / "checkpoint.json").read_text())["world"]
        if world != self.world:
            raise CheckpointError(
                f"{checkpoint} was written by {world} ranks and this run has {self.world}: "
                f"start torchrun with {world} processes"
            )
        return _read(checkpoint / "state.pt"), _read(checkpoint / f"rank_{self.rank}.pt")


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one."""
    damage: list[str] = []
    for checkpoint in reversed(_steps(folder)):
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint, damage
        damage.append(f"{checkpoint.name} is damaged ({reason})")
    return None, damage


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_shared(checkpoint: Path) -> dict[str, Any]:
    """What all ranks share of one checkpoint, for use outside training."""
    return _read(checkpoint / "state.pt")


def restore(algorithm: Algorithm, shared: dict[str, Any], checkpoint: Path) -> None:
    """Gives an algorithm what ranks share of its run's checkpoint, or raises `CheckpointError`."""
    try:
        for name, learner in algorithm.learners.items():
            learner.load_state_dict(shared["learners"][name])
        for name, value in algorithm.state.items():
            value.copy_(shared["algorithm"][name])
    except (KeyError, RuntimeError) as error:
        if isinstance(error, KeyError) and error.args == ("algorithm",):
            names = ", ".join(algorithm.state)
            raise CheckpointError(
                f"{checkpoint} is older than this program and lacks the {names} of its "
                "algorithm: begin again in another --run-dir"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{checkpoint} is of another network or recipe: {reason}") from None


def load_start(
    config: FinetuneConfig, learner: Learner, model: str, dist_env: DistEnv
) -> tuple[str, list[str]]:
    """Gives a fresh learner the weights that fine-tuning begins with, statistics included.

    They are those of the network that the start run evaluates; of two, the last. Returns a line
    that tells of it, and warnings of damaged checkpoints. `model` is this run's model.name. Raises
    `CheckpointError` if there is no checkpoint or it does not fit.
    """
    folder = Path(config.start) / "checkpoints"
    if not Path(config.start).is_dir():
        raise ConfigError(f"algorithm.start: there is no folder {config.start}")
    checkpoint, damage = from_first(newest(folder) if dist_env.is_first else None)
    if checkpoint is None:
        why = "; ".join(damage) or "nothing has been saved there"
        raise CheckpointError(
            f"algorithm.start: {folder} holds no usable checkpoint ({why}): "
            "give the run directory of a run that has trained"
        )
    try:
        shared = read_shared(checkpoint)
    except OSError as error:
        raise CheckpointError(f"algorithm.start: {checkpoint}: {error.strerror}") from None
    name = shared.get("voters", [*shared["learners"]])[-1]
    state = shared["learners"][name]
    kind = "network" if state["average"] is None else config.weights
    try:
        for network in filter(None, (learner.network, learner.average)):
            network.load_state_dict(state[kind])
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:120]
        raise CheckpointError(
            f"algorithm.start: {checkpoint} is of another network or number of classes than "
            f"model.name {model} for this data ({reason}): see {config.start}/config.yaml"
        ) from None
    told = f"begins with the {kind} of {name} after step {step_of(checkpoint)}, {checkpoint}"
    return told, [f"{warning}; starting from {checkpoint.name}" for warning in damage]


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written, so that nothing of it is held in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(block)
        self._bytes += len(block)
        return len(block)

    def facts(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _write(path: Path, content: Callable[[BinaryIO], Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            content(cast(BinaryIO, hashed))
        except RuntimeError:
            # Torch's archive is closed while the error passes through, and complains in its place.
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return hashed.facts()


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or nothing."""
    try:
        about = json.loads((checkpoint / "checkpoint.json").read_text())
        if about["format"] != FORMAT:
            return f"checkpoint.json: format {about['format']!r} is not {FORMAT!r}"
        for name, facts in about["files"].items():
            with (checkpoint / name).open("rb") as file:
                digest = hashlib.sha256()
                for block in _blocks(file):
                    digest.update(block)
            if digest.hexdigest() != facts["sha256"]:
                return f"{name}: its content does not have the checksum it was written with"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "checkpoint.json: not readable"
    return None


def _blocks(file: io.BufferedReader) -> Iterator[bytes]:
    while block := file.read(1 << 22):
        yield block


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
