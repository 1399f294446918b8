"""A checkpoint is whole or absent, and damage never goes unnoticed."""

import errno
import json
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpl_fast import atomic
from mpl_fast.errors import CheckpointError
from mpl_fast.training import checkpoint, saving
from mpl_fast.training.checkpoint import Checkpoints, newest, read_shared
from mpl_fast.training.state import evaluated
from mpl_fast.training.trained import read_checkpoint
from tests.tiny_run import flip, replace_state


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, rank=0, world=1)


def save(store: Checkpoints, step: int) -> Path:
    return store.save(step, {"w": torch.full((100,), float(step))}, {"rng": torch.arange(3)})


def change(checkpoint: Path, edit: Callable[[Any], object]) -> None:
    file = checkpoint / "checkpoint.json"
    about = json.loads(file.read_text())
    edit(about)
    file.write_text(json.dumps(about))


def test_goes_round(store: Checkpoints) -> None:
    shared, mine, world = store.load(save(store, 5))
    assert world == 1
    assert torch.equal(shared["w"], torch.full((100,), 5.0))
    assert torch.equal(mine["rng"], torch.arange(3))
    assert torch.equal(read_shared(store.folder / "step_00000005")["w"], shared["w"])


def test_one_that_its_run_has_removed_meanwhile_is_one_line(store: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000005: No such file .*; run the command"):
        read_shared(store.folder / "step_00000005")


def test_keeps_the_newest(store: Checkpoints) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_nothing_yet(store: Checkpoints) -> None:
    assert store.newest() == (None, [])


def elsewhere(checkpoint: Path) -> dict[str, Any]:
    """An entry of a file outside, with its checksum."""
    file = checkpoint.parent / "elsewhere"
    file.write_bytes(b"content")
    return {f"../{file.name}": {"bytes": 7, "sha256": atomic.sha256_of(file)}}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one flipped bit": lambda c: flip(c / "state.pt"),
    "truncated": lambda c: (c / "state.pt").write_bytes((c / "state.pt").read_bytes()[:50]),
    "empty": lambda c: (c / "rank_0.pt").write_bytes(b""),
    "file gone": lambda c: (c / "rank_0.pt").unlink(),
    "manifest gone": lambda c: (c / "checkpoint.json").unlink(),
    "manifest cut": lambda c: (c / "checkpoint.json").write_text('{"format": "mpl'),
    "manifest of another kind": lambda c: (c / "checkpoint.json").write_text("[1]"),
    "manifest nested deep": lambda c: (c / "checkpoint.json").write_text("[" * 100_000),
    "a file elsewhere": lambda c: change(c, lambda a: a["files"].update(elsewhere(c))),
    "a file not listed": lambda c: change(c, lambda a: a["files"].pop("state.pt")),
    "a rank not listed": lambda c: change(c, lambda a: a["files"].pop("rank_0.pt")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_to_the_one_before(kind: str, store: Checkpoints) -> None:
    good, bad = save(store, 1), save(store, 2)
    DAMAGE[kind](bad)
    found, reasons = store.newest()
    assert found == good
    assert len(reasons) == 1 and "step_00000002 is damaged" in reasons[0]


class Touch:
    """What a malicious pickle would do when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_another_program_wrote_is_one_line(
    zipped: bool, store: Checkpoints, tmp_path: Path
) -> None:
    """With a right checksum. PyTorch's own message advises to execute it."""
    checkpoint = save(store, 1)
    for file in ("state.pt", "rank_0.pt"):
        path = checkpoint / file
        kept = torch.load(path, weights_only=True)
        for value in (Touch(tmp_path / "proof"), [1], b"no pickle", {"learners": 3}):
            if zipped or value == b"no pickle":
                replace_state(path, value)  # type: ignore[arg-type]
            else:
                replace_state(path, {})
                path.write_bytes(pickle.dumps(value))
            if isinstance(value, dict):
                with pytest.raises(CheckpointError, match=r"state\.pt is not of this program: no"):
                    evaluated(value)
                continue
            with pytest.raises(CheckpointError) as error:
                store.load(checkpoint)
            text = str(error.value)
            assert text.startswith(f"{path} is not of this program (") and "\n" not in text
            assert "nothing in it was executed" in text
            assert "weights_only" not in text and "trusted" not in text
        replace_state(path, kept)
    assert not (tmp_path / "proof").exists()


def test_all_damaged_is_an_error_that_names_them(store: Checkpoints) -> None:
    for step in (1, 2):
        flip(save(store, step) / "state.pt")
    with pytest.raises(CheckpointError, match=r"step_00000002.*step_00000001"):
        store.newest()


def test_leftovers_of_a_kill_are_removed_and_never_read(store: Checkpoints) -> None:
    save(store, 1)
    halves = [store.folder / f".{kind}_step_00000002" for kind in ("writing", "removing")]
    for half in halves:
        half.mkdir()
        (half / "state.pt").write_bytes(b"half")
    assert store.newest() == (store.path(1), [])  # another command removes nothing
    again = Checkpoints(store.folder, keep=2, rank=0, world=1)
    assert not any(half.exists() for half in halves)
    assert again.newest()[0] == store.folder / "step_00000001"


OTHERS = ["step_best", "step_00000001_backup", "step_1", "step_00000009", ".writing_of_mine"]


def test_what_this_program_did_not_write_is_neither_read_nor_removed(store: Checkpoints) -> None:
    """Copies of a checkpoint, the last under the name of another; links, the first to one that was
    moved away; files beside its own."""
    first, second = save(store, 1), save(store, 2)
    elsewhere = first.rename(store.folder.parent / "elsewhere")
    for name in OTHERS:
        shutil.copytree(elsewhere, store.folder / name)
    for link in (first, store.folder / "step_00000008"):
        link.symlink_to(elsewhere)
    (second / "notes.txt").write_text("the good one")
    (store.folder / "step_00000007").write_text("a file")
    others = {*OTHERS, "step_00000001", "step_00000008", "step_00000002", "step_00000007"}
    again = Checkpoints(store.folder, keep=1, rank=0, world=1)
    assert again.newest() == (second, [])
    for step in (3, 4):
        save(again, step)
    assert {path.name for path in store.folder.iterdir()} == {*others, "step_00000004"}
    again.remove_after(0)
    assert {path.name for path in store.folder.iterdir()} == others
    assert len([*elsewhere.iterdir()]) == 3
    with pytest.raises(CheckpointError, match="something else has its name: move that away"):
        save(again, 2)
    assert (second / "notes.txt").exists() and again.newest() == (second, [])


@pytest.mark.parametrize("file", ["state.pt", "checkpoint.json", "."])
def test_what_cannot_be_read_is_not_damage(
    file: str, store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, or a server that is away; the folder itself too."""
    save(store, 1)
    broken = {".": store.folder}.get(file, save(store, 2) / file)

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *more: object) -> object:
            if path == broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *more)

        return call

    for owner, name in ((atomic, "sha256_of"), (Path, "read_text"), (Path, "iterdir")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(CheckpointError) as raised:
        store.newest()
    assert f"{broken} cannot be read: Input/output error; it was not changed" in str(raised.value)
    monkeypatch.undo()
    assert len([*store.folder.iterdir()]) == 2


def test_one_of_another_version_is_not_damage(store: Checkpoints) -> None:
    about = save(store, 1) / "checkpoint.json"
    about.write_text(about.read_text().replace("checkpoint/1", "checkpoint/2"))
    with pytest.raises(CheckpointError, match="use the version that wrote it"):
        store.newest()


@pytest.mark.parametrize("until", ["it is verified", "it is read"])
def test_beside_a_run_that_saves_every_step_the_next_one_is_read(
    until: str, store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run removes each of the first checkpoints while it is verified or read."""
    owner, name = (atomic, "sha256_of") if until == "it is verified" else (torch, "load")
    steps, real = iter(range(2, 12)), getattr(owner, name)

    def slow(path: Path, *args: object, **options: object) -> object:
        for step in [*steps][:2] if path.parent.name < "step_00000008" else []:
            save(store, step)
        return real(path, *args, **options)

    save(store, 1)
    monkeypatch.setattr(owner, name, slow)
    found, shared, warnings = read_checkpoint(store.folder.parent)
    assert warnings == [] and shared["w"][0] == checkpoint.step_of(found) >= 3


def test_on_other_ranks_what_all_share_is_loaded(store: Checkpoints) -> None:
    path = save(store, 1)
    shared, first, world = Checkpoints(store.folder, keep=2, rank=3, world=4).load(path)
    assert torch.equal(shared["w"], torch.full((100,), 1.0))
    assert torch.equal(first["rng"], torch.arange(3)) and world == 1


@pytest.mark.parametrize("limit", [1 << 10, 1 << 20, 7_900_000])
def test_a_full_disk_is_one_line_that_leaves_the_old_one(limit: int, store: Checkpoints) -> None:
    """And not the error of torch's archive when it is closed half-way."""
    good, before = save(store, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": torch.ones(2_000_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"of step 2 cannot be written: File too large"):
            store.save(2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest(store.folder) == (good, [])


def test_a_save_behind_damaged_ones_keeps_the_good_and_drops_the_damaged(
    tmp_path: Path,
) -> None:
    store = Checkpoints(tmp_path, keep=2, rank=0, world=1)
    wide = Checkpoints(tmp_path, keep=9, rank=0, world=1)
    for step in (500, 1000, 1500):
        save(wide, step)
    for step in (1000, 1500):
        flip(tmp_path / f"step_{step:08d}" / "state.pt")
    save(store, 600)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000500", "step_00000600"]


def test_a_step_saved_twice_is_replaced(store: Checkpoints) -> None:
    save(store, 1)
    path = store.save(1, {"w": torch.zeros(1)}, {})
    assert torch.equal(store.load(path)[0]["w"], torch.zeros(1))
    assert json.loads((path / "checkpoint.json").read_text())["step"] == 1


class KilledError(BaseException):
    """In place of a SIGKILL."""


def test_a_kill_while_a_step_is_saved_again_loses_no_checkpoint(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first save after a rollback is; a kill before each call that moves or removes it."""
    folder, left = store.folder, 0

    def until_killed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return real(*given, **options)

        return call

    save(store, 1)
    for kills in range(9):
        left = kills
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (shutil, "rmtree")):
                patch.setattr(owner, name, until_killed(getattr(owner, name)))
            try:
                save(store, 1)
                break
            except KilledError:
                pass
        store = Checkpoints(folder, keep=2, rank=0, world=1)
        assert store.newest() == (store.path(1), []), f"killed after {kills} calls"
        assert [*folder.iterdir()] == [store.path(1)]
    assert 3 <= kills < 8


def test_an_old_one_that_is_still_read_fails_no_save(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that a process of the same machine has open, and so its folder."""

    def rmdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", rmdir)
        for step in (1, 2, 3, 3):
            save(store, step)
        again = Checkpoints(store.folder, keep=2, rank=0, world=1)
        again.remove_after(2)
        assert again.newest() == (store.path(2), []) and len(again.all()) == 1
    Checkpoints(store.folder, keep=2, rank=0, world=1)
    assert [*store.folder.iterdir()] == [store.path(2)]


# --- in the background ---


class Disk:
    """Writes when it is let, and has no space for the checkpoints of some steps."""

    def __init__(self) -> None:
        self.runs, self.full = threading.Event(), list[int]()
        self._real = saving._write
        self.runs.set()

    def write(self, path: Path, state: saving.State, synced: atomic.Synced) -> dict[str, object]:
        assert self.runs.wait(600)
        if int(path.parent.name[-8:]) in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self._real(path, state, synced)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(saving, "_write", made.write)
    yield made
    made.runs.set()


def test_the_state_is_that_of_the_save_whatever_training_does_meanwhile(
    store: Checkpoints, disk: Disk
) -> None:
    """Into the buffers of the save before, too."""
    network = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    w, each = torch.zeros(1000), [torch.zeros(2), torch.zeros(3)]
    for step in (1, 2):
        with torch.no_grad():
            network.weight.fill_(step)
        w.fill_(step)
        each[0].fill_(step)
        disk.runs.clear()
        path = store.save(
            step, {"network": network.state_dict(), "w": w, "each": each}, {}, background=True
        )
        with torch.no_grad():
            network.weight.fill_(-1)
        w.fill_(-1)
        each[0].fill_(-1)
        assert not path.exists() and store.saved < step
        disk.runs.set()
        store.finish()
        assert store.saved == step and store.newest() == (path, [])
        found = store.load(path)[0]
        assert (found["w"] == step).all() and (found["each"][0] == step).all()
        assert len(found["each"]) == 2 and (found["network"]["weight"] == step).all()
        assert found["network"]["weight"].is_contiguous(memory_format=torch.channels_last)
        assert vars(found["network"]) == vars(network.state_dict())  # the versions of modules


def test_a_second_save_waits_for_the_first(store: Checkpoints, disk: Disk) -> None:
    disk.runs.clear()
    state = {"w": torch.ones(1)}
    first = store.save(1, state, {}, background=True)
    waiting = threading.Thread(target=store.save, args=(2, state, {}))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not (store.folder / ".writing_step_00000002").exists()
    disk.runs.set()
    waiting.join(600)
    assert store.all() == [first, store.path(2)]


def test_a_failed_write_is_a_warning_and_two_in_a_row_an_error(
    store: Checkpoints, disk: Disk
) -> None:
    failures: list[tuple[int, str]] = []
    store.failed = lambda step, reason: failures.append((step, reason))
    disk.full = [2, 4, 5]
    for step in (1, 2, 3, 4, 5):
        store.save(step, {"w": torch.ones(1)}, {}, background=True)
    with pytest.raises(CheckpointError) as raised:
        store.finish()
    file = f"{store.folder}/.writing_step_0000000%d/rank_0.pt"
    assert failures == [(s, f"No space left on device ({file % s})") for s in disk.full]
    assert str(raised.value) == (
        f"the checkpoints of steps 4 and 5 cannot be written: {failures[-1][1]}; earlier ones are "
        "untouched"
    )
    assert store.all() == sorted(store.folder.iterdir()) == [store.path(1), store.path(3)]
    assert store.saved == 3


def test_what_is_called_before_and_after_a_checkpoint_is_complete(
    store: Checkpoints, disk: Disk
) -> None:
    seen: list[object] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    path = store.path(1)
    store.save(
        1, {}, {}, background=True, before=lambda: seen.append(path.exists()), after=seen.append
    )
    store.finish()
    assert seen == [False, path] and path.exists()
    store.save(2, {}, {}, background=True, before=full, after=seen.append)
    store.finish()
    assert store.failures == [2] and store.newest() == (path, []) and len(seen) == 2


def test_a_fault_of_the_program_is_no_warning(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(1, {"cannot be pickled": threading.Lock()}, {}, background=True)
    with pytest.raises(TypeError, match="pickle"):
        store.finish()


def test_a_checkpoint_is_complete_with_the_files_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never without; whichever rank is first."""
    stores = [Checkpoints(tmp_path, keep=2, rank=rank, world=2) for rank in (0, 1)]
    failures: list[str] = []
    stores[0].failed = lambda step, reason: failures.append(reason)
    for step in (1, 2):
        for rank in (0, 1) if step == 1 else (1, 0):
            stores[rank].save(step, {"w": torch.ones(2)}, {"of": rank}, background=True)
            if rank == step - 1:
                assert not stores[0].path(step).exists()
        for store in stores:
            store.finish()
        assert newest(tmp_path) == (stores[0].path(step), [])
        assert [store.load(stores[0].path(step))[1] for store in stores] == [{"of": 0}, {"of": 1}]
    monkeypatch.setattr(saving, "GRACE", 0.1)
    stores[0].save(3, {"w": torch.ones(2)}, {}, background=True)
    stores[0].close()
    assert newest(tmp_path)[0] == stores[0].path(2)
    (reason,) = failures
    assert reason.startswith("rank 1 has not written its part")


def test_it_is_not_begun_without_the_space_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"learners": {"a": [torch.zeros(1000)], "b": (torch.zeros(500, dtype=torch.int8),)}}
    disk = {"total": 9000, "used": 0, "free": 4500}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(**disk))
    saving.check_space(tmp_path, state)
    disk["free"] = 4499
    with pytest.raises(OSError, match=r"No space .*: it needs 4\.5 kB, and 4\.5 kB are free"):
        saving.check_space(tmp_path, state)
    disk["total"] = 0  # a network file system without numbers
    saving.check_space(tmp_path, state)


def test_progress_is_what_has_reached_the_disk(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is synced every so many bytes, so that a slow disk is seen to go on."""
    seen, real = list[str](), os.fsync

    def fsync(descriptor: int) -> None:
        seen.append("synced")
        real(descriptor)

    monkeypatch.setattr(atomic, "SYNC_EVERY", 1 << 20)
    monkeypatch.setattr("mpl_fast.atomic.os.fsync", fsync)
    store.progressed = lambda: seen.append("progress")
    store.save(1, {"w": [torch.ones(1 << 18) for _ in range(5)]}, {}, background=True)
    store.finish()
    first = " ".join(seen)[: len("synced synced progress" + 5 * " synced progress")]
    # A rank's small file and its folder; then the large one.
    assert first == "synced synced progress" + 5 * " synced progress"


def test_other_ranks_see_the_progress_of_the_first(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes what all share; the others wait for that in an exchange, also when all parts are
    written."""
    exchanging, exchanged = threading.Event(), threading.Event()

    def exchange(value: str) -> str:
        exchanging.set()
        assert exchanged.wait(600)
        return value

    monkeypatch.setattr(saving, "FOLLOW", 0.01)
    monkeypatch.setattr(checkpoint, "broadcast_object", exchange)
    second = Checkpoints(store.folder, keep=2, rank=1, world=2)
    progress = threading.Semaphore(0)
    second.progressed = progress.release
    second.save(1, {}, {"rng": torch.arange(3)}, background=True)
    assert all(progress.acquire(timeout=600) for _ in range(2))  # its own part, and what it sees
    waiting = threading.Thread(target=second.finish, daemon=True)
    waiting.start()
    assert exchanging.wait(600)
    for size in (1, 2):
        assert not progress.acquire(timeout=0.1)
        (store.folder / ".writing_step_00000001/state.pt.tmp").write_bytes(size * b"x")
        assert progress.acquire(timeout=20)
    exchanged.set()
    waiting.join(600)
    assert not waiting.is_alive() and second.saved == 1
