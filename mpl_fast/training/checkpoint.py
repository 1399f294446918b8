"""Checkpoints: written to a temporary folder, synced, checksummed, then renamed.

A checkpoint is a folder ``step_00001000/`` with ``state.pt`` (equal on all ranks), one
``rank_N.pt`` for each rank (random generators, data position) and ``checkpoint.json`` with the size
and SHA-256 of each file. torch.load does not notice a flipped bit; the checksums do.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mpl_fast import atomic, models
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.config import FinetuneConfig
from mpl_fast.config.aliases import CHECKPOINT_KEYS, renamed
from mpl_fast.config.run import CHECKPOINTS, WhichCheckpoint
from mpl_fast.data.class_names import first_difference, positions, unshared
from mpl_fast.data.manifest import Manifest
from mpl_fast.distributed import all_gather_object, barrier, broadcast_object, rank
from mpl_fast.errors import CheckpointError, ConfigError
from mpl_fast.learner import Learner
from mpl_fast.models.weights_file import reason
from mpl_fast.untrusted import file_in, json_value

FORMAT = "mpl_fast.checkpoint/1"
State = dict[str, Any]


class Checkpoints:
    """The newest checkpoints of a run, `keep` of them."""

    def __init__(self, folder: Path, *, keep: int, rank: int, world: int) -> None:
        self.folder, self.keep, self.rank, self.world = folder, keep, rank, world
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None
            for leftover in folder.glob(".writing_*"):
                shutil.rmtree(leftover)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return _checkpoints(self.folder)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, shared: State, rank_state: State) -> Path:
        """Writes the state shared by all ranks (rank 0's is taken) and each rank's own.

        A collective: every rank must call it. The checkpoint appears complete under its final name,
        or not at all. Raises `OSError` on the rank whose file cannot be written.
        """
        partial, final = self.folder / f".writing_{step:08d}", self.path(step)
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        barrier()
        files = {f"rank_{self.rank}.pt": rank_state}
        files |= {"state.pt": shared} if self.rank == 0 else {}
        written = {name: _write(partial / name, state) for name, state in files.items()}
        by_rank = all_gather_object(written)
        if self.rank == 0:
            about = {"format": FORMAT, "step": step, "world": self.world}
            about["files"] = {name: file for files in by_rank for name, file in files.items()}
            atomic.write_json(partial / "checkpoint.json", about)
            self._publish(partial, final)
        barrier()
        return final

    def adopt(self, checkpoint: Path) -> None:
        """Adds a checkpoint of another folder of the run, by hard links, as the latest.

        Not a collective: the first rank calls it. Raises `OSError` if it cannot be written.
        """
        partial, final = self.folder / f".writing_{checkpoint.name}", self.folder / checkpoint.name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in checkpoint.iterdir():
            _link(file, partial / file.name)
        atomic.sync_folder(partial)
        self._publish(partial, final)

    def remove_after(self, step: int) -> None:
        """Removes checkpoints of later steps, which the run repeats; on the first rank."""
        for checkpoint in self.all():
            if step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)

    def _publish(self, partial: Path, final: Path) -> None:
        """Gives a complete checkpoint its name, and removes old ones."""
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        atomic.sync_folder(self.folder)
        self._remove_old(final)

    def _remove_old(self, latest: Path) -> None:
        """Keeps `latest` and the newest before it; one after it is damaged, or the run would have
        resumed from there."""
        checkpoints = self.all()
        kept = [c for c in checkpoints if c.name <= latest.name][-self.keep :]
        for old in {*checkpoints} - {*kept}:
            shutil.rmtree(old)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, and a warning for each damaged one passed over.

        Raises `CheckpointError` if there are checkpoints but none can be used.
        """
        found, damage = newest(self.folder)
        if found is None and damage:
            raise CheckpointError(
                f"no usable checkpoint: {'; '.join(damage)}; use another --run-dir"
            )
        return found, damage

    def load(self, checkpoint: Path) -> tuple[State, State]:
        """Returns the state shared by all ranks and this rank's own."""
        world = json.loads((checkpoint / "checkpoint.json").read_text())["world"]
        if world != self.world:
            raise CheckpointError(
                f"{checkpoint} was written by {world} ranks and this run has {self.world}: "
                f"start torchrun with {world} processes"
            )
        return read_shared(checkpoint), _read(checkpoint / f"rank_{self.rank}.pt")


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one.

    A collective: the first rank reads.
    """
    found: tuple[Path | None, list[str]] = broadcast_object(
        _newest(folder) if rank() == 0 else None
    )
    return found


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    damage: list[str] = []
    for checkpoint in reversed(_checkpoints(folder)):
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint, damage
        damage.append(f"{checkpoint.name} is damaged ({reason})")
    return None, damage


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_shared(checkpoint: Path) -> State:
    """The state of a checkpoint that all ranks share. Raises `CheckpointError` if it is gone: a
    run that still trains removes its old ones."""
    file = checkpoint / "state.pt"
    try:
        shared: State = renamed(_read(file), CHECKPOINT_KEYS)
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {error.strerror}; run the command again") from None
    names = shared.get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file} is not of this program: its classes are no list of names")
    return shared


def restore(algorithm: Algorithm, shared: State, checkpoint: Path) -> None:
    """Loads a checkpoint's shared state into an algorithm. Raises `CheckpointError` if it is of
    another network or recipe."""
    try:
        for name, learner in algorithm.learners.items():
            learner.load_state_dict(shared["learners"][name])
        for name, value in algorithm.state.items():
            value.copy_(shared["algorithm"][name])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, KeyError) and error.args == ("algorithm",):
            names = ", ".join(algorithm.state)
            raise CheckpointError(
                f"{checkpoint} is older than this program and lacks the {names} of its "
                "algorithm: start again in another --run-dir"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{checkpoint} is of another network or recipe: {reason}") from None


def no_class_names(checkpoint: Path) -> str:
    """A warning about a checkpoint of an older version."""
    return f"{checkpoint} was written before class names were stored: labels are taken as they are"


def check_same_classes(shared: State, manifest: Manifest, checkpoint: Path) -> None:
    """Raises `CheckpointError` if data to resume with have other classes, or another order."""
    trained = shared.get("classes")
    if trained is not None and trained != [*manifest.classes]:
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than {manifest.root} has: "
            f"{first_difference(trained, manifest.classes)}; resume with the data of before, or "
            "use another --run-dir"
        )


class Trained(NamedTuple):
    """The networks that a run evaluates, as its newest checkpoint has them."""

    option: str
    """Which names the run."""
    model: str
    """The model.name that the networks should be of."""
    checkpoint: Path
    weights: dict[str, tuple[str, State]]
    """By learner: "average" or "network", and its state dict."""
    about: str
    """How classes were mapped, as the end of a message."""
    warnings: list[str]
    """Of damaged checkpoints passed over, and if one has no class names."""


def read_trained(
    option: str, run: str, model: str, classes: Sequence[str], *, average: bool = True
) -> Trained:
    """The networks that the run in a folder evaluates, their heads in the order of `classes`.

    Without `average`, networks themselves in place of their averages. A collective. Raises
    `CheckpointError` if there is no checkpoint or it is of other classes.
    """
    checkpoint, warnings = find_checkpoint(run, option=option)
    shared = read_shared(checkpoint)
    trained, about = shared.get("classes"), ""
    found = evaluated(shared, average=average)
    if trained is None:
        warnings.append(no_class_names(checkpoint))
    elif {*trained} != {*classes}:
        raise CheckpointError(
            f"{option}: {checkpoint} is of other classes than this data "
            f"({unshared(trained, classes)}); for a new last layer, use another recipe with "
            f"--model.pretrained {checkpoint}/state.pt:{[*found][-1]}"
        )
    elif trained != [*classes]:
        order = positions(classes, trained)
        about = "; its classes are in another order and were mapped by name"
        for name, (kind, weights) in found.items():
            found[name] = kind, models.with_class_order(weights, model, order)
    return Trained(option, model, checkpoint, found, about, warnings)


def load_trained(trained: Trained, name: str, network: nn.Module) -> None:
    """Loads the weights of one learner. Raises `CheckpointError` if they are of another network."""
    try:
        network.load_state_dict(trained.weights[name][1])
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:120]
        raise CheckpointError(
            f"{trained.option}: {trained.checkpoint} is of another network or number of classes "
            f"than model.name {trained.model} for this data ({reason}): see "
            f"{trained.checkpoint.parents[1]}/config.yaml"
        ) from None


def load_start(
    config: FinetuneConfig, learner: Learner, model: str, classes: Sequence[str]
) -> tuple[str, list[str]]:
    """Loads the weights and statistics that fine-tuning starts from into a learner.

    They are those of the network that the run `config.start` evaluates, the last if there are two,
    its head in the order of `classes`. `model` is this run's model.name. Returns a message, and
    warnings. Raises `CheckpointError` if there is no checkpoint or it does not fit.
    """
    average = config.weights == "average"
    found = read_trained("algorithm.start", config.start, model, classes, average=average)
    name = [*found.weights][-1]
    for network in filter(None, (learner.network, learner.average)):
        load_trained(found, name, network)
    step, kind = step_of(found.checkpoint), found.weights[name][0]
    message = f"begins with the {kind} of {name} after step {step}, {found.checkpoint}"
    return message + found.about, found.warnings


def find_checkpoint(
    run: str | Path, which: WhichCheckpoint = "newest", option: str = ""
) -> tuple[Path, list[str]]:
    """A run's newest or best undamaged checkpoint, and a warning for each that was passed over.

    `option` names the run in errors. A collective. Raises `CheckpointError` if there is none.
    """
    folder, of = Path(run) / CHECKPOINTS[which], option and f"{option}: "
    if not Path(run).is_dir():
        raise ConfigError(f"{of}there is no folder {run}")
    checkpoint, damage = newest(folder)
    if checkpoint is None:
        why = "; ".join(damage) or "nothing has been saved there"
        advice = "give the run directory of a run that has trained"
        if which == "best":
            advice = "train with --checkpoint-best true, or use newest"
        raise CheckpointError(f"{of}{folder} holds no usable checkpoint ({why}): {advice}")
    return checkpoint, [f"{warning}; using {checkpoint.name}" for warning in damage]


def evaluated(shared: State, *, average: bool = True) -> dict[str, tuple[str, State]]:
    """The networks that a run evaluates, by learner: "average" or "network", and its state dict.

    Without `average`, networks themselves in place of their averages. Raises `CheckpointError` for
    the state of another program.
    """
    found = {}
    try:
        for name in shared.get("eval_ensemble", [*shared["learners"]][-1:]):
            state = shared["learners"][name]
            kind = "average" if average and state["average"] is not None else "network"
            if not isinstance(state[kind], dict):
                raise TypeError(f"{kind} of {name} is no state dict")
            found[name] = kind, state[kind]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"state.pt is not of this program: no networks ({error})") from None
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def _link(file: Path, to: Path) -> None:
    """Links a file, or copies it where the file system has no hard links."""
    try:
        os.link(file, to)
    except OSError:
        with atomic.atomic_file(to) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy)


def _write(path: Path, state: State) -> dict[str, Any]:
    """Saves with torch.save; returns the size and checksum for checkpoint.json."""
    with atomic.atomic_file(path) as file:
        torch.save(state, file)
    return {"bytes": file.size, "sha256": file.sha256}


def _read(path: Path) -> State:
    """A file of a checkpoint. Raises `CheckpointError`, without executing anything, if another
    program wrote it; its checksum has been checked before."""
    try:
        loaded: State = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError(f"a {type(loaded).__name__}")
        return loaded
    except OSError:
        raise
    except Exception as error:  # the reader can raise anything; its advice is to execute pickles
        raise CheckpointError(
            f"{path} is not of this program ({reason(error)}), and nothing in it was executed: "
            "use the checkpoint of a run that you trust"
        ) from None


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        about = json_value((checkpoint / "checkpoint.json").read_text())
        if about["format"] != FORMAT:
            return f"checkpoint.json: format {about['format']!r} is not {FORMAT!r}"
        for name in ["state.pt", *(f"rank_{rank}.pt" for rank in range(about["world"]))]:
            about["files"][name]  # what is not listed has no checksum
        for name, file in about["files"].items():
            if atomic.sha256_of(file_in(checkpoint, name)) != file["sha256"]:
                return f"{name}: its content does not have the checksum it was written with"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checkpoint.json: not readable"
    return None
