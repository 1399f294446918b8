"""A run that was stopped, killed or damaged ends bit for bit like one that was not."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mpl_fast import algorithms
from mpl_fast.algorithms import Algorithm
from mpl_fast.config import MPLConfig, RunConfig
from mpl_fast.config.command_line import as_yaml
from mpl_fast.errors import CheckpointError, ConfigError
from mpl_fast.learner import Learner
from mpl_fast.training.checkpoint import restore
from mpl_fast.training.run_dir import RunDir
from tests.tiny_run import (
    ALGORITHMS,
    arguments,
    assert_same,
    command,
    environment,
    final_state,
    rows,
    run,
    run_in_turn,
)

OTHERS = [name for name in ALGORITHMS if name != "mpl"]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def straight(ranks: int, tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run(arguments(folder, tiny_rec), ranks)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_stopped_at_any_step_and_resumed_equals_straight(tiny_rec: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    sessions = [arguments(straight, tiny_rec)]
    for stop in (1, 2, 3, 4, 5):
        options = arguments(tmp_path / f"stop{stop}", tiny_rec)
        sessions += [[*options, "--stop-at", str(stop)], options]
    done = run_in_turn(*sessions)
    assert done.returncode == 0, done.stderr
    for stop in (1, 2, 3, 4, 5):
        folder = tmp_path / f"stop{stop}"
        assert f"paused after step {stop}" in done.stdout
        assert f"resuming after step {stop}" in done.stdout
        assert_same(final_state(straight), final_state(folder))
        last = [r for r in rows(folder) if "eval/top1" in r][-1]
        assert last == [r for r in rows(straight) if "eval/top1" in r][-1]


def alive(word: str) -> list[str]:
    """Processes with a word in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes():
                found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_killed_and_resumed_equals_straight(
    ranks: int, straight: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    """SIGKILL to what the user started, as soon as the first checkpoint exists.

    Under torchrun that is the launcher alone; its workers must follow, or they would train on.
    """
    folder = tmp_path / "run"
    options = arguments(folder, tiny_rec)
    process = subprocess.Popen(
        command(options, ranks),
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    while alive(str(folder)):
        assert time.monotonic() < deadline, "a worker outlived its launcher"
        time.sleep(0.05)
    assert not (folder / "summary.json").exists()
    resumed = run(options, ranks)
    assert resumed.returncode == 0 and "resuming after step" in resumed.stdout, resumed.stderr
    assert_same(final_state(straight), final_state(folder))
    steps = [r["step"] for r in rows(folder) if "train_seconds" in r]
    assert steps == [2, 4, 6]


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_run_again(
    straight: Path, ranks: int, tiny_rec: Path, tmp_path: Path
) -> None:
    """Sent to torchrun if there is one, which passes it on and itself always ends with 1."""
    folder = tmp_path / "run"
    options = arguments(folder, tiny_rec)
    process = subprocess.Popen(
        command(options, ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "unlabeled images a step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    rest, problems = process.communicate(timeout=120)
    assert process.returncode == (75 if ranks == 1 else 1), problems
    assert "the same command resumes" in rest
    assert run(options, ranks).returncode == 0
    assert_same(final_state(straight), final_state(folder))


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_with_one_warning(
    straight: Path, ranks: int, tiny_rec: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = arguments(folder, tiny_rec)
    assert run([*options, "--stop-at", "4"], ranks).returncode == 0
    newest = folder / "checkpoints" / "step_00000004" / "state.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    newest.write_bytes(content)
    resumed = run(options, ranks)
    assert resumed.returncode == 0, resumed.stderr
    warnings = [line for line in resumed.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "step_00000004" in warnings[0] and "step_00000002" in warnings[0]
    assert_same(final_state(straight), final_state(folder))


@pytest.mark.slow
def test_a_complete_run_says_so_and_a_lost_summary_is_made_good(
    straight: Path, ranks: int, tiny_rec: Path
) -> None:
    """A kill may come between the last checkpoint and the summary."""
    file = straight / "summary.json"
    before = file.read_bytes()
    if ranks == 1:
        again = run(arguments(straight, tiny_rec))
        assert again.returncode == 0 and "complete already" in again.stdout, again.stderr
        assert file.read_bytes() == before
    file.unlink()
    again = run(arguments(straight, tiny_rec), ranks)
    assert again.returncode == 0, again.stderr
    assert json.loads(file.read_text())["top1"] == json.loads(before)["top1"]


@pytest.mark.slow
def test_every_recipe_trains_under_torchrun_and_resumes(tiny_rec: Path, tmp_path: Path) -> None:
    """On two ranks, from the middle of a role player's period too: the last checkpoint is lost.

    Fine-tuning is in test_finetune.py.
    """
    sessions = {}
    for name in OTHERS:
        folder = tmp_path / name.replace(" ", "_") / "run"
        sessions[folder] = [*arguments(folder, tiny_rec, recipe=name), "--checkpoint-every", "3"]
    done = run_in_turn(*sessions.values(), ranks=2)
    assert done.returncode == 0, done.stderr
    straight = {folder: final_state(folder) for folder in sessions}
    for folder, state in straight.items():
        shutil.rmtree(folder / "checkpoints" / "step_00000006")
        if "baseline" in state["algorithm"]:
            assert state["algorithm"]["baseline"] != 0  # or it would prove nothing
    done = run_in_turn(*sessions.values(), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming after step 3") == len(OTHERS)
    for folder, state in straight.items():
        assert_same(state, final_state(folder), folder.parent.name)


def algorithm_of(config: MPLConfig) -> Algorithm:
    return algorithms.build(config, lambda c: Learner(nn.Linear(3, 2), c, steps=6))


def test_a_checkpoint_without_the_algorithms_state(tmp_path: Path) -> None:
    """As versions before the state wrote it: used where there is no state, else refused."""
    plain, moving = algorithm_of(MPLConfig()), algorithm_of(MPLConfig(baseline=0.9))
    with torch.no_grad():
        moving.learners["teacher"].parameters[0].fill_(7.0)
    old = {"learners": {name: made.state_dict() for name, made in moving.learners.items()}}
    restore(plain, old, tmp_path)
    assert (plain.learners["teacher"].parameters[0] == 7.0).all()
    with pytest.raises(CheckpointError, match="older than this program and lacks the baseline"):
        restore(moving, old, tmp_path)
    moving.state["baseline"].fill_(3.0)
    new = old | {"algorithm": {"baseline": torch.tensor(0.5)}}
    restore(moving, new, tmp_path)
    assert moving.state["baseline"].item() == 0.5


def test_a_key_that_an_older_run_did_not_know_had_its_default(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    config = RunConfig(run_dir=str(folder))
    known = yaml.safe_load(as_yaml(config))
    del known["algorithm"]["held_out"]
    for text in (yaml.safe_dump(known), as_yaml(config)):
        (folder / "config.yaml").write_text(text)
        RunDir(config).close()
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"algorithm\.held_out was 0\.0 and is 0\.5"):
            RunDir(replace(config, algorithm=MPLConfig(held_out=0.5)))
