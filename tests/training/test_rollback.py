"""A run that diverges goes back to its newest checkpoint and on with other images."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.batch import Batch
from mpl_fast.data.loader import TrainLoader
from mpl_fast.training.checkpoint import Checkpoints
from mpl_fast.training.watchdog import Watchdog
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, events, final_state, rows, train_here

pytestmark = pytest.mark.slow
BAD = (5, 6)  # batches
ROLLBACK = ("--on-spike", "rollback")


class KilledError(Exception):
    """In place of a SIGKILL."""


@pytest.fixture
def options(tiny_rec: Path) -> list[str]:
    """Dropout would differ: its generator goes on as the images do."""
    return ["--log-every", "1", "--algorithm.learner.dropout", "0", "--steps", "8"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Batch]]:
    """All that loaders have returned."""
    returned: list[Batch] = []
    real = TrainLoader.__next__

    def recorded(self: TrainLoader) -> Batch:
        returned.append(real(self))
        return returned[-1]

    monkeypatch.setattr(TrainLoader, "__next__", recorded)
    yield returned


def test_it_ends_as_if_the_bad_images_had_not_been_there(
    tiny_rec: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count, bad, ends_at = TrainLoader.__next__, 0, set[tuple[int, ...]](), 0

    def with_bad_ones(self: TrainLoader) -> Batch:
        nonlocal count
        count += 1
        if count == ends_at:
            raise KilledError
        batch = real(self)
        bad.update({tuple(batch.truth.tolist())} if count in BAD else ())
        if tuple(batch.truth.tolist()) in bad:
            batch.labeled.fill_(math.nan)
        return batch

    def without_them(self: TrainLoader) -> Batch:
        nonlocal count
        count += 1
        while count in BAD:
            real(self)
            count += 1
        return real(self)

    monkeypatch.setattr("mpl_fast.training.log.MAX_SKIPPED_IN_A_ROW", len(BAD))
    again, killed, other = (tmp_path / name for name in ("again", "killed", "other"))
    monkeypatch.setattr(TrainLoader, "__next__", with_bad_ones)
    done = train_here(*arguments(again, tiny_rec, recipe="uda"), *options, *ROLLBACK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not finite: the last 2 updates of the learner up to step 6") == 1
    line = f"rollback 1 of at most 3: back from step 6 to {again}/checkpoints/step_00000004, with"
    assert done.stdout.count(line) == 1
    assert [r["step"] for r in rows(again) if "train_seconds" in r] == [*range(1, 9)]
    found = [(e["step"], e["reached"]) for e in events(again) if e["event"] == "rollback"]
    assert found == [(4, 6)]
    count, ends_at = 0, BAD[-1] + 2  # before the next checkpoint
    given = [*arguments(killed, tiny_rec, recipe="uda"), *options, *ROLLBACK]
    with pytest.raises(KilledError):
        train_here(*given)
    count, ends_at = BAD[-1], 0
    done = train_here(*given)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4" in done.stdout and "rollback" not in done.stdout
    count = 0
    monkeypatch.setattr(TrainLoader, "__next__", without_them)
    straight = train_here(*arguments(other, tiny_rec, recipe="uda"), *options)
    assert straight.returncode == 0, straight.stderr
    wanted = final_state(other, 8)
    assert wanted.pop("rollbacks") == 0
    for folder in (again, killed):
        ends = final_state(folder, 8)
        assert ends.pop("rollbacks") == 1
        assert_same(ends, wanted, ignore=("seconds",))


def test_a_spike_of_the_loss_and_the_last_rollback(
    tiny_rec: Path,
    tmp_path: Path,
    options: list[str],
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With this factor every row is a spike as soon as there is a median, of five rows. The
    watchdog allows for the time in which a checkpoint is read."""
    calls = list[str]()
    for owner, name in (
        (Watchdog, "beat"),
        (Watchdog, "expect_long_work"),
        (Checkpoints, "newest"),
    ):
        real = getattr(owner, name)

        def recorded(*given: Any, real: Any = real, name: str = name) -> Any:
            calls.append(name)
            return real(*given)

        monkeypatch.setattr(owner, name, recorded)
    given = [*arguments(tmp_path / "run", tiny_rec, recipe="uda"), *options, *ROLLBACK]
    done = train_here(*given, "--spike-factor", "1e-9", "--rollbacks", "2")
    assert done.returncode == 5
    assert done.stdout.count(f"{tmp_path}/run/checkpoints/step_00000004, with the images") == 2
    last = done.stderr.splitlines()[-1]
    assert (
        "loss/labeled is" in last
        and "up to step 5" in last
        and "over 1e-09 times its median" in last
    )
    labels = [tuple(batch.truth.tolist()) for batch in batches]
    assert len(batches) == 6 + 1 + 1 and len({*labels}) == len(labels)
    state = final_state(tmp_path / "run", 4)
    assert state["rollbacks"] == 2
    before = [calls[at - 1] for at, name in enumerate(calls) if name == "newest" and at]
    assert before == ["expect_long_work"] * 2
