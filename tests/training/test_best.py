"""The best checkpoint and the early end are those of an uninterrupted run, after any stop."""

import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from mpl_fast.config import RunConfig
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import CheckpointError
from mpl_fast.training.best import Best
from mpl_fast.training.checkpoint import Checkpoints, newest
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, final_state, rows, run_in_turn

STEPS = 8
OWN = ("seconds", "per_second", "run_dir", "best_checkpoint")  # of each run, in its summary
RANKS = [
    pytest.param(1, id="ranks 1", marks=pytest.mark.slow),
    pytest.param(2, id="ranks 2", marks=[pytest.mark.slow, pytest.mark.nightly]),
]


class Sessions(NamedTuple):
    """Folders of runs by name, the step of the best evaluation, and what was printed."""

    folder: Path
    best: int
    out: str
    err: str


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="module", params=RANKS)
def ended(
    request: pytest.FixtureRequest, tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sessions:
    """Runs with other stops than `straight`, which has none.

    `killed`: by a SIGKILL after its best checkpoint was saved and before it was kept. `damaged`:
    resumed from before its best checkpoint, which is damaged. `patient`: ended early, then
    continued; before that, its summary and its best checkpoint are lost.
    """
    folder, ranks = tmp_path_factory.mktemp("best"), request.param

    def options(name: str, *more: str) -> list[str]:
        given = arguments(folder / name, tiny_rec, recipe="supervised")
        given += ["--steps", str(STEPS), "--eval-every", "1", "--checkpoint-every", "3"]
        return [*given, "--checkpoint-best", "true", *more]

    def lost(name: str, what: str) -> list[str]:
        return ["move", str(folder / name / what), str(folder / f"{name} {what.split('/')[0]}")]

    first = run_in_turn(options("straight"), options("patient", "--patience=1"), ranks=ranks)
    assert first.returncode == 0, first.stderr
    best, early = (summary(folder / name)["best_step"] for name in ("straight", "patient"))
    kept = [f"checkpoints_best/step_{step:08d}" for step in (best, early)]
    flipped = folder / "damaged" / kept[0] / "state.pt"
    done = run_in_turn(
        ["evaluate", str(folder / "straight"), "--checkpoint", "best"],
        options("killed", "--stop-at", str(best)),
        lost("killed", kept[0]),
        options("killed"),
        options("damaged", "--stop-at", str(best)),
        ["flip", str(flipped)],
        options("damaged"),
        options("patient", "--patience=1"),
        lost("patient", "summary.json"),
        lost("patient", kept[1]),
        options("patient", "--patience=1"),
        options("patient"),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr
    return Sessions(folder, best, first.stdout + done.stdout, done.stderr)


@pytest.mark.parametrize("name", ["killed", "damaged", "patient"])
def test_a_run_with_stops_ends_with_the_best_of_one_without(name: str, ended: Sessions) -> None:
    run, straight = ended.folder / name, ended.folder / "straight"
    assert_same(final_state(run, STEPS), final_state(straight, STEPS), ignore=("seconds",))
    states = []
    for each in (run, straight):
        found, damage = newest(each / "checkpoints_best")
        assert found and not damage and summary(each)["best_checkpoint"] == str(found)
        assert [*(each / "checkpoints_best").iterdir()] == [found]
        states.append(torch.load(found / "state.pt", weights_only=True))
    assert states[1]["step"] == ended.best
    assert_same(states[0], states[1], ignore=("seconds",))
    assert_same(summary(run), summary(straight), ignore=OWN)
    accuracies = [[r for r in rows(each) if "eval/top1" in r] for each in (run, straight)]
    assert accuracies[0] == accuracies[1]


def test_the_best_is_evaluated_and_named(ended: Sessions) -> None:
    run = ended.folder / "straight"
    best = run / "checkpoints_best" / f"step_{ended.best:08d}"
    top1 = max(r["eval/top1"] for r in rows(run) if "eval/top1" in r)
    assert ended.out.count(f"\n{best}: top-1 {top1:.2f} %") == 1  # by tools/evaluate.py
    assert f"(best {top1:.2f} % at step {ended.best}, {best}) in" in ended.out


def test_an_early_end_is_an_end_until_patience_is_raised(ended: Sessions) -> None:
    top1s = [r["eval/top1"] for r in rows(ended.folder / "straight") if "eval/top1" in r]
    # `delay_steps` is 1, so the evaluation after step 1 does not count.
    early = next(at for at in range(2, STEPS + 1) if top1s[at - 1] <= max(top1s[: at - 1]))
    assert early < STEPS, "the run is to end early: change its options"
    assert ended.out.count("ends early, since the last 1 evaluations were no better than") == 1
    assert ended.out.count(f"it ended early, after step {early}: a larger --patience, or 0,") == 2
    assert ended.out.count(f"complete already: top-1 {top1s[early - 1]:.2f} % in ") == 1
    before = json.loads((ended.folder / "patient summary.json").read_text())
    assert (before["steps"], before["stopped_early"]) == (early, True)
    assert before["top1"] == top1s[early - 1]
    assert f"resuming after step {early} from {ended.folder}/patient" in ended.out


# --- alone ---


def best_of(run_dir: Path, **options: Any) -> Best:
    chosen = {"checkpoint_best": True, "patience": 2, "steps": 6, **options}
    return Best(RunConfig(run_dir=str(run_dir), **chosen), DistEnv(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("top1s", "delay", "patience", "end"),
    [
        ([1, 2, 1, 2], 0, 2, 4),  # an equal one is no better
        ([1, 1, 2, 1, 1], 0, 2, 5),  # in a row
        ([1, 1, 1, 1, 1], 3, 2, 5),  # networks that have not moved yet
        ([1, 1, 1], 0, 0, None),
        ([1, 1, 1, 1, 1, 1], 0, 5, None),  # at the last step
    ],
)
def test_patience_counts_evaluations_in_a_row(
    top1s: list[float], delay: int, patience: int, end: int | None, tmp_path: Path
) -> None:
    best, ends = best_of(tmp_path, patience=patience), []
    for step, top1 in enumerate(top1s, 1):
        best.add(top1, step, delay)
        ends += [step] if best.stopped_early else []
    assert ends == ([end] if end else [])


@pytest.mark.parametrize(("patience", "over"), [(1, True), (2, True), (3, False), (0, False)])
def test_another_patience_of_a_run_that_ended_early(
    patience: int, over: bool, tmp_path: Path
) -> None:
    ended, again = best_of(tmp_path), best_of(tmp_path, patience=patience)
    for step in range(1, 4):
        ended.add(1.0, step, 0)
    again.restore(ended.state())
    assert again.stopped_early == over
    running = ended.state() | {"stopped_early": False}  # its next evaluation decides
    again.restore(running)
    assert not again.stopped_early


def saved(run_dir: Path, *steps: int) -> list[Path]:
    store = Checkpoints(run_dir / "checkpoints", keep=9, rank=0, world=1)
    return [store.save(step, {"w": torch.ones(9) * step}, {}) for step in steps]


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints_best").iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_one_is_kept_without_another_copy_where_links_are(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    best = best_of(tmp_path)
    for checkpoint in (first := saved(tmp_path, 1, 2)):
        best.keep(checkpoint)
    assert kept(tmp_path) == ["step_00000002"]
    assert newest(tmp_path / "checkpoints_best") == (
        tmp_path / "checkpoints_best/step_00000002",
        [],
    )
    for file in first[1].iterdir():
        assert file.samefile(tmp_path / "checkpoints_best/step_00000002" / file.name) == links


def test_one_that_cannot_be_kept_leaves_nothing(tmp_path: Path) -> None:
    """Links would keep the disk space of a checkpoint that is removed later."""
    (checkpoint,) = saved(tmp_path, 1)
    best = best_of(tmp_path)
    (tmp_path / "checkpoints_best/step_00000001").write_text("of the user")
    with pytest.raises(FileExistsError, match="something else has its name"):
        best.keep(checkpoint)
    assert kept(tmp_path) == ["step_00000001"]


def test_a_resume_has_the_best_of_its_checkpoint(tmp_path: Path) -> None:
    one, two, three = saved(tmp_path, 1, 2, 3)
    best = best_of(tmp_path)
    best.add(5.0, 2, 0)
    assert best.resume(three, 3) == "" and kept(tmp_path) == ["step_00000002"]  # was not linked
    best.add(6.0, 3, 0)
    best.keep(three)
    before = best_of(tmp_path)
    before.restore({"best": {"best_top1": 4.0, "best_step": 1}})
    assert before.resume(two, 2) == "" and kept(tmp_path) == ["step_00000001"]  # 3 is repeated
    best.keep(three)
    gone = best_of(tmp_path)
    gone.restore({"best": {"best_top1": 4.0, "best_step": 0}})
    assert "4.00 % at step 0, was not kept" in gone.resume(one, 1)
    assert gone.checkpoint() == "" and kept(tmp_path) == []  # 3 is repeated


def test_the_best_of_an_earlier_run_is_not_replaced(tmp_path: Path) -> None:
    best = best_of(tmp_path)
    best.start()
    best.keep(saved(tmp_path, 1)[0])
    with pytest.raises(CheckpointError, match=r"step_00000001 is of an earlier run.*--run-dir"):
        best_of(tmp_path).start()
    best_of(tmp_path, checkpoint_best=False).start()
    assert not best_of(tmp_path / "other", checkpoint_best=False).keeps(0)
    assert not (tmp_path / "other").exists()
