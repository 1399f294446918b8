"""A checkpoint is whole or absent, and damage never goes unnoticed."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpl_fast import atomic
from mpl_fast.errors import CheckpointError
from mpl_fast.training import checkpoint
from mpl_fast.training.checkpoint import Checkpoints, newest, read_checkpoint, read_shared
from tests.tiny_run import flip


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, rank=0, world=1)


def save(store: Checkpoints, step: int) -> Path:
    return store.save(step, {"w": torch.full((100,), float(step))}, {"rng": torch.arange(3)})


def test_goes_round(store: Checkpoints) -> None:
    shared, mine = store.load(save(store, 5))
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


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one flipped bit": lambda c: flip(c / "state.pt"),
    "truncated": lambda c: (c / "state.pt").write_bytes((c / "state.pt").read_bytes()[:50]),
    "empty": lambda c: (c / "rank_0.pt").write_bytes(b""),
    "file gone": lambda c: (c / "rank_0.pt").unlink(),
    "manifest gone": lambda c: (c / "checkpoint.json").unlink(),
    "manifest cut": lambda c: (c / "checkpoint.json").write_text('{"format": "mpl'),
    "manifest of another kind": lambda c: (c / "checkpoint.json").write_text("[1]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_to_the_one_before(kind: str, store: Checkpoints) -> None:
    good, bad = save(store, 1), save(store, 2)
    DAMAGE[kind](bad)
    found, reasons = store.newest()
    assert found == good
    assert len(reasons) == 1 and "step_00000002 is damaged" in reasons[0]


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
    again = Checkpoints(store.folder, keep=2, rank=0, world=1)
    assert not any(half.exists() for half in halves)
    assert again.newest()[0] == store.folder / "step_00000001"


OTHERS = ["step_best", "step_00000001_backup", "step_1", "step_00000009", ".writing_of_mine"]


def test_what_this_program_did_not_write_is_neither_read_nor_removed(store: Checkpoints) -> None:
    """Copies of a checkpoint, the last under the name of another; a link; files beside its own."""
    first, second = save(store, 1), save(store, 2)
    elsewhere = shutil.copytree(first, store.folder.parent / "elsewhere")
    for name in OTHERS:
        shutil.copytree(first, store.folder / name)
    (store.folder / "step_00000008").symlink_to(elsewhere)
    (second / "notes.txt").write_text("the good one")
    (store.folder / "step_00000000").write_text("a file")
    others = {*OTHERS, "step_00000008", "step_00000002", "step_00000000"}
    again = Checkpoints(store.folder, keep=1, rank=0, world=1)
    assert again.newest() == (second, [])
    for step in (3, 4):
        save(again, step)
    assert {path.name for path in store.folder.iterdir()} == {*others, "step_00000004"}
    again.remove_after(0)
    assert {path.name for path in store.folder.iterdir()} == others
    assert len([*elsewhere.iterdir()]) == 3
    with pytest.raises(OSError, match="something else has its name: move that away"):
        save(again, 2)
    assert (second / "notes.txt").exists() and again.newest() == (second, [])


@pytest.mark.parametrize("file", ["state.pt", "checkpoint.json", "."])
def test_what_cannot_be_read_is_not_damage(
    file: str, store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, or a server that is away; the folder itself too."""
    save(store, 1)
    broken = (save(store, 2) if file != "." else store.folder) / file

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


def test_another_number_of_ranks_is_refused(store: Checkpoints) -> None:
    path = save(store, 1)
    other = Checkpoints(store.folder, keep=2, rank=0, world=4)
    with pytest.raises(CheckpointError, match="written by 1 ranks and this run has 4"):
        other.load(path)


@pytest.mark.parametrize("limit", [1 << 10, 1 << 20, 7_900_000])
def test_a_full_disk_is_an_oserror_that_leaves_the_old_one(limit: int, store: Checkpoints) -> None:
    """And not the error of torch's archive when it is closed half-way."""
    good, before = save(store, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": torch.ones(2_000_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
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
