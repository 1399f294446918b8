"""Training and then fine-tuning by one command: as two commands, stopped and resumed anywhere."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.config import FinetuneConfig, RunConfig, SupervisedConfig
from mpl_fast.errors import ConfigError
from mpl_fast.training.phases import _check_not_begun
from mpl_fast.training.run import Run
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, final_state, run_in_turn, train_here
from tests.training.test_resume import ENDLESS, kill

LEARNER = ["lr", "0.05", "delay_steps", "1", "warmup", "2", "ema", "0.9", "dropout", "0.2"]


def options(run: Path, rec: Path, *more: str) -> list[str]:
    """Meta Pseudo Labels, then fine-tuning with the options of its networks."""
    then = ["--then", "finetune", "--then.steps", "3", "--then.labeled-batch", "8"]
    for key, value in zip(LEARNER[::2], LEARNER[1::2], strict=True):
        then += [f"--then.algorithm.learner.{key}", value]
    return [*arguments(run, rec), *then, *more]


def test_both_runs_are_those_of_two_commands(tiny_rec: Path, tmp_path: Path) -> None:
    run, second = tmp_path / "run", tmp_path / "run" / "finetune"
    both = options(run, tiny_rec)
    done = train_here(*both, "--stop-at", "4")
    assert done.returncode == 0 and "paused after step 4" in done.stdout
    assert not second.exists()
    done = train_here(*both, "--then.stop-at", "1")
    assert done.returncode == 0 and "resuming after step 4" in done.stdout
    assert f"begins with the average of student after step 6, {run}/" in done.stdout
    assert done.stdout.count("done: top-1") == 1 and "paused after step 1" in done.stdout
    done = train_here(*both)
    assert done.returncode == 0 and "resuming after step 1" in done.stdout
    assert "complete already" in done.stdout and (second / "summary.json").exists()
    done = train_here(*both)
    assert done.returncode == 0 and done.stdout.count("complete already: top-1") == 2

    done = train_here(*arguments(tmp_path / "alone", tiny_rec))
    tuning = [*arguments(tmp_path / "tuned", tiny_rec, recipe="supervised"), "--steps", "3"]
    tuning += ["--recipe", "finetune", "--algorithm.start", str(tmp_path / "alone")]
    done = train_here(*tuning, "--labeled-batch", "8")
    assert done.returncode == 0, done.stderr
    for one, other, step in ((run, tmp_path / "alone", 6), (second, tmp_path / "tuned", 3)):
        assert_same(final_state(one, step), final_state(other, step), ignore=("seconds",))


def test_a_signal_in_the_last_step_begins_no_second_run(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, evaluate = options(tmp_path / "run", tiny_rec), Run._evaluate

    def signaled(run: Run) -> None:
        if run.steps_done == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_evaluate", signaled)
        done = train_here(*both)
    assert done.returncode == 75
    assert "done: top-1" in done.stdout and "the same command goes on with the next" in done.stdout
    assert not (tmp_path / "run" / "finetune").exists()
    done = train_here(*both)
    assert done.returncode == 0 and done.stdout.count("done: top-1") == 1


def test_what_the_second_run_cannot_do_is_found_before_the_first(
    tiny_rec: Path, tmp_path: Path
) -> None:
    both = options(tmp_path / "run", tiny_rec)
    done = train_here(*both, "--then.labeled-batch", "21")
    assert done.returncode == 2 and "labeled_batch 21 is larger than the 20 labeled" in done.stderr
    assert not (tmp_path / "run").exists()
    done = train_here(*both, "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("recipe")] == [
        "mpl", "finetune"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_second_run_moves_with_the_first_and_is_of_its_end(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends early, is moved, and would go on with more patience."""
    both = options(tmp_path / "run", tiny_rec, "--eval-every=2", "--patience=1")
    both += ["--algorithm.student.lr=0", "--algorithm.student.delay-steps=0"]
    done = train_here(*both, "--then.stop-at", "1")
    assert done.returncode == 0 and "ends early" in done.stdout, done.stderr
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    done = train_here(*both, "--run-dir", "moved", "--then.stop-at", "2")
    assert done.returncode == 0 and "paused after step 2" in done.stdout, done.stderr
    before = sorted((tmp_path / "moved").rglob("step_*"))
    done = train_here(*both, "--run-dir", "moved", "--patience=2")
    assert done.returncode == 2 and not done.stdout.count("resuming")
    assert "moved/finetune has begun from an earlier end of moved, which now goes" in done.stderr
    assert sorted((tmp_path / "moved").rglob("step_*")) == before
    (tmp_path / "moved" / "finetune").rename(tmp_path / "aside")
    done = train_here(*both, "--run-dir", "moved", "--patience=2")
    assert done.returncode == 0 and done.stdout.count("done: top-1") == 2, done.stderr


def test_a_later_run_that_begins_from_no_other_may_have_begun(tmp_path: Path) -> None:
    first = RunConfig(algorithm=SupervisedConfig(), run_dir=str(tmp_path / "first"))
    later = replace(first, run_dir=str(tmp_path / "later"))
    (tmp_path / "later/checkpoints/step_00000001").mkdir(parents=True)
    _check_not_begun([later], first)
    with pytest.raises(ConfigError, match="has begun from an earlier end"):
        _check_not_begun([replace(later, algorithm=FinetuneConfig(start=first.run_dir))], first)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_ranks_killed_in_the_second_run_resume_it(tiny_rec: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "killed", tmp_path / "straight"
    more = ["--then.steps", str(ENDLESS), "--then.checkpoint-every", "1"]
    both = options(run, tiny_rec, *more)
    kill(both, 2, run / "finetune")
    last = max(int(one.name[5:]) for one in run.glob("finetune/checkpoints/step_*"))
    end = ["--then.stop-at", str(last + 2)]
    done = run_in_turn([*both, *end], options(straight, tiny_rec, *more, *end), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "complete already" in done.stdout
    assert f"resuming after step {last} from {run}/finetune/checkpoints/step_" in done.stdout
    one, other = (final_state(folder / "finetune", last + 2) for folder in (run, straight))
    assert_same(one, other, ignore=("seconds",))
