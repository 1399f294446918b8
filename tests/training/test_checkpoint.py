"""A checkpoint is whole or absent, and damage never goes unnoticed."""

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.errors import CheckpointError
from mpl_fast.training.checkpoint import Checkpoints, evaluated, newest, read_shared
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
    "manifest nested deep": lambda c: (c / "checkpoint.json").write_text("[" * 100_000),
    "a file elsewhere": lambda c: change(c, lambda a: a["files"].update({"../x": {}})),
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
    half = store.folder / ".writing_00000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    again = Checkpoints(store.folder, keep=2, rank=0, world=1)
    assert not half.exists()
    assert again.newest()[0] == store.folder / "step_00000001"


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
