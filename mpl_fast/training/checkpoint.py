"""Checkpoints: written to a temporary folder in the background, synced, checksummed, then renamed.

A checkpoint is a folder ``step_00001000/`` with ``state.pt`` (equal on all ranks), one
``rank_N.pt`` for each rank (random generators, data position) and ``checkpoint.json`` with the size
and SHA-256 of each file. torch.load does not notice a flipped bit; the checksums do. Whatever else
is in the folder of checkpoints, such as a copy under another name, is neither read nor removed.

On another number of ranks a run continues from ``state.pt`` alone: weights, statistics, averages,
optimizer, schedule and results are in it. What is in ``rank_N.pt`` begins anew on each rank, drawn
from the seed and the step: the generators (of dropout) and the order of the images.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mpl_fast import atomic
from mpl_fast.config.aliases import CHECKPOINT_KEYS, renamed
from mpl_fast.distributed import all_gather_object, barrier, broadcast_object, rank
from mpl_fast.errors import CheckpointError
from mpl_fast.models.weights_file import reason
from mpl_fast.training.saving import Files, HostCopy, Saving, State
from mpl_fast.untrusted import file_in, json_value

FORMAT = "mpl_fast.checkpoint/1"
NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})")
FILE = re.compile(r"checkpoint\.json|state\.pt|rank_\d+\.pt")
UNFINISHED = re.compile(r"\.writing_(step_)?\d{8,}")
REMOVING = re.compile(r"\.removing_(\.replaced_)?(step_)?\d{8,}")
REPLACED = re.compile(r"\.replaced_(step_\d{8,})")  # whole until another one has its name
ATTEMPTS = 20  # to read a checkpoint beside a run that replaces it


class Checkpoints:
    """The newest checkpoints of a run, `keep` of them."""

    def __init__(self, folder: Path, *, keep: int, rank: int, world: int) -> None:
        self.folder, self.keep, self.rank, self.world = folder, keep, rank, world
        self.saved = -1
        """Step of the newest one that is complete."""
        self.failures = list[int]()
        """Steps of the latest saves, if they failed."""
        self.failed: Callable[[int, str], None] = lambda step, reason: None
        """Is called with the step and the reason of a save that failed on this rank, in the thread
        that writes."""
        self.progressed: Callable[[], None] = lambda: None
        """Is called in that thread whenever data of a save has reached the disk."""
        self._copy = HostCopy()
        self._saving: Saving | None = None
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.iterdir():
                    replaced = REPLACED.fullmatch(leftover.name)
                    if replaced and not (folder / replaced[1]).exists():
                        leftover.rename(folder / replaced[1])
                    elif replaced or REMOVING.fullmatch(leftover.name):
                        shutil.rmtree(leftover, ignore_errors=True)
                    elif UNFINISHED.fullmatch(leftover.name):
                        shutil.rmtree(leftover)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoints_in(self.folder)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step_{step:08d}"

    def save(
        self,
        step: int,
        shared: State,
        rank_state: State,
        *,
        background: bool = False,
        before: Callable[[], None] | None = None,
        after: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes the state shared by all ranks (rank 0's is taken) and each rank's own.

        A collective: every rank must call it, and it first waits for a save in the background. The
        checkpoint appears complete under its final name, or not at all; on the first rank `before`
        is called just before that and `after` just after. In the background, only copies the state:
        `finish` waits for the rest. Raises `CheckpointError` as `finish` does.
        """
        self.finish()
        partial, final = self._partial(step), self.path(step)
        states = {f"rank_{self.rank}.pt": rank_state}
        states |= {"state.pt": shared} if self.rank == 0 else {}

        def publish(files: Files) -> None:
            about = {"format": FORMAT, "step": step, "world": self.world, "files": files}
            atomic.write_json(partial / "checkpoint.json", about)
            if before:
                before()
            self.progressed()
            self._publish(partial, final)
            self.saved = step
            self.progressed()
            if after:
                after(final)

        self._saving = Saving(
            step,
            partial,
            self._copy.take(states) if background else states,
            rank=self.rank,
            world=self.world,
            ready=self._copy.wait,
            publish=publish,
            failed=self.failed,
            progressed=self.progressed,
        )
        if not background:
            self.finish(last=True)
        return final

    def finish(self, *, last: bool = False) -> None:
        """Waits for a save in the background. A collective.

        Raises `CheckpointError` on all ranks if that save and the one before it failed on any of
        them; if it is the `last`, for one that failed.
        """
        saving = self._saving
        if saving is None:
            return
        saving.wait_for_part()
        failures = [reason for reason in all_gather_object(saving.failure) if reason]
        if self.rank == 0:
            saving.wait(give_up=bool(failures))
        failure = broadcast_object(saving.failure or next(iter(failures), ""))
        saving.wait(give_up=True)
        self._saving = None
        if not failure:
            self.saved, self.failures = saving.step, []
            return
        if self.rank == 0:
            shutil.rmtree(saving.partial, ignore_errors=True)
        barrier()
        self.failures.append(saving.step)
        if last or len(self.failures) > 1:
            steps = " and ".join(map(str, self.failures))
            many = "s" * (len(self.failures) > 1)
            raise CheckpointError(
                f"the checkpoint{many} of step{many} {steps} cannot be written: {failure}; earlier "
                "ones are untouched"
            )

    def close(self) -> None:
        """Waits for a save in the background, at the end of a run that has failed: no collective,
        and no error."""
        if self._saving is not None:
            self._saving.close()

    def adopt(self, checkpoint: Path) -> None:
        """Adds a checkpoint of another folder of the run, by hard links, as the latest.

        Not a collective: the first rank calls it. Raises `OSError` if it cannot be written.
        """
        step = step_of(checkpoint)
        partial, final = self._partial(step), self.path(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for file in checkpoint.iterdir():
                _link(file, partial / file.name)
            atomic.sync_folder(partial)
            self._publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove_after(self, step: int) -> None:
        """Removes checkpoints of later steps, which the run repeats; on the first rank."""
        for checkpoint in self.all():
            if step_of(checkpoint) > step and _is_ours(checkpoint):
                _remove(checkpoint)

    def _partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return self.folder / f".writing_{self.path(step).name}"

    def _publish(self, partial: Path, final: Path) -> None:
        """Gives a complete checkpoint its name, and removes old ones."""
        replaced = final.with_name(f".replaced_{final.name}")
        if os.path.lexists(final):
            if not _is_ours(final):
                why = "something else has its name: move that away"
                raise FileExistsError(errno.EEXIST, why, str(final))
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        atomic.sync_folder(self.folder)
        if replaced.exists():
            _remove(replaced)
        self._remove_old(step_of(final))

    def _remove_old(self, latest: int) -> None:
        """Keeps that of step `latest` and the newest before it; one after it is damaged, or the run
        would have resumed from there."""
        checkpoints = [c for c in self.all() if _is_ours(c)]
        kept = [c for c in checkpoints if step_of(c) <= latest][-self.keep :]
        for old in {*checkpoints} - {*kept}:
            _remove(old)

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

    def load(self, checkpoint: Path) -> tuple[State, State, int]:
        """Returns the state shared by all ranks, this rank's own, and how many ranks wrote it.

        If they were more or fewer than now, the second is that of the first rank.
        """
        try:
            world: int = json_value((checkpoint / "checkpoint.json").read_text())["world"]
        except OSError as error:
            raise _not_read(error, checkpoint) from None
        number = self.rank if world == self.world else 0
        return read_shared(checkpoint), _read(checkpoint / f"rank_{number}.pt"), world


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one.

    A collective: the first rank reads. Raises `CheckpointError` if that is not possible, which is
    no damage.
    """
    found: tuple[Path | None, list[str]] | CheckpointError | None = None
    if rank() == 0:
        try:
            found = _newest(folder)
        except OSError as error:
            found = _not_read(error, folder)
        except CheckpointError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    assert found is not None
    return found


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    for _ in range(ATTEMPTS):
        damage: list[str] = []
        for checkpoint in reversed(checkpoints_in(folder)):
            if _copied_from(checkpoint):
                continue
            reason = _damage(checkpoint)
            if reason is None:
                return checkpoint, damage
            if not checkpoint.exists():
                break  # a run that still trains has removed it and has a newer one
            damage.append(f"{checkpoint.name} is damaged ({reason})")
        else:
            return None, damage
    raise replaced(folder)


def _not_read(error: OSError, where: Path) -> CheckpointError:
    return CheckpointError(
        f"{error.filename or where} cannot be read: {error.strerror}; it was not changed: run the "
        "command again when it can be read, or move the checkpoint away to use the one before"
    )


def replaced(folder: Path) -> CheckpointError:
    """The error after `ATTEMPTS` to read a checkpoint that was gone each time."""
    return CheckpointError(
        f"{folder}: a run removes its checkpoints before they are read: run the command again"
    )


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_shared(checkpoint: Path) -> State:
    """The state of a checkpoint that all ranks share. Raises `CheckpointError` if it cannot be
    read, or is gone: a run that still trains removes its old ones."""
    file = checkpoint / "state.pt"
    shared: State = renamed(_read(file), CHECKPOINT_KEYS)
    names = shared.get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file} is not of this program: its classes are no list of names")
    return shared


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, undamaged or not, oldest first; none if it does not exist.

    Raises `CheckpointError` if the folder cannot be read.
    """
    try:
        found = [one for one in folder.iterdir() if NAME.fullmatch(one.name) and one.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _not_read(error, folder) from None
    return sorted(found, key=step_of)


def _is_ours(checkpoint: Path) -> bool:
    """Whether this program wrote all that is there, so that it may be removed."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return False
    files = all(FILE.fullmatch(file.name) for file in checkpoint.iterdir())
    return files and not _copied_from(checkpoint)


def _copied_from(checkpoint: Path) -> str:
    """The name that a checkpoint was written under, if it is another; else an empty text."""
    try:
        name = f"step_{json_value((checkpoint / 'checkpoint.json').read_text())['step']:08d}"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return ""
    return name if name != checkpoint.name else ""


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint as a whole for those who read it, and after a kill.

    Where NFS keeps a file because another process has it open, its folder stays until the next
    start of the run.
    """
    gone = checkpoint.with_name(f".removing_{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _link(file: Path, to: Path) -> None:
    """Links a file, or copies it where the file system has no hard links."""
    try:
        os.link(file, to)
    except OSError:
        with atomic.atomic_file(to) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy)


def _read(path: Path) -> State:
    """A file of a checkpoint. Raises `CheckpointError`, without executing anything, if another
    program wrote it; its checksum has been checked before."""
    try:
        loaded: State = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError(f"a {type(loaded).__name__}")
        return loaded
    except OSError as error:
        failure = _not_read(error, path)
        if isinstance(error, FileNotFoundError):
            failure = CheckpointError(f"{path.parent}: {error.strerror}; run the command again")
        failure.alone = True  # other ranks may read it
        raise failure from None
    except Exception as error:  # the reader can raise anything; its advice is to execute pickles
        raise CheckpointError(
            f"{path} is not of this program ({reason(error)}), and nothing in it was executed: "
            "use the checkpoint of a run that you trust"
        ) from None


def _damage(checkpoint: Path) -> str | None:
    """Why the content of a checkpoint is not what was written, or None.

    Raises `OSError` if that cannot be read, and `CheckpointError` for one of another version.
    """
    try:
        about = json_value((checkpoint / "checkpoint.json").read_text())
        if about["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint} has the format {about['format']!r} and this program reads "
                f"{FORMAT!r}: use the version that wrote it"
            )
        for name in ["state.pt", *(f"rank_{rank}.pt" for rank in range(about["world"]))]:
            about["files"][name]  # what is not listed has no checksum
        for name, file in about["files"].items():
            if atomic.sha256_of(file_in(checkpoint, name)) != file["sha256"]:
                return f"{name}: its content does not have the checksum it was written with"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checkpoint.json: not readable"
    return None
