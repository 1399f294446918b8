"""A run that was stopped, killed or damaged ends bit for bit like one that was not."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
from mpl_fast.training.checkpoint import checkpoints_in
from mpl_fast.training.run_dir import RunDir
from mpl_fast.training.state import restore
from tests.algorithms.problems import assert_same
from tests.tiny_run import (
    ALGORITHMS,
    arguments,
    command,
    environment,
    events,
    final_state,
    rows,
    run_in_turn,
    train_here,
)

ENDLESS = 1_000_000  # steps of the run that is killed and stopped: on no machine it ends before

RANKS = [pytest.param(n, id=f"ranks {n}", marks=pytest.mark.slow) for n in (1, 2)]


class Sessions(NamedTuple):
    """Runs in folders of their own, and what those of the last processes have printed."""

    ranks: int
    folder: Path
    resumed: dict[str, tuple[int, Path]]
    """By the name of a run: the step after which it was resumed, the checkpoint that it equals."""
    out: str
    err: str


@pytest.fixture(scope="module", params=RANKS)
def ended(
    request: pytest.FixtureRequest, tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sessions:
    """A run that is killed and stopped in processes of its own, and others in one process a rank.

    Of one rank they are paused after each step; of two they are one for each recipe, resumed
    without its last checkpoint, from the middle of a role player's period too.
    """
    ranks: int = request.param
    folder = tmp_path_factory.mktemp("ended")

    def options(name: str, recipe: str = "mpl", *more: str) -> list[str]:
        return [*arguments(folder / name / "run", tiny_rec, recipe=recipe), *more]

    def checkpoint(name: str, step: int = 6) -> Path:
        return folder / name / "run" / "checkpoints" / f"step_{step:08d}"

    killed, long = (options(name, "mpl", "--steps", str(ENDLESS)) for name in ("killed", "long"))
    kill(killed, ranks, folder / "killed/run")
    stopped = stop(killed, ranks, folder / "killed/run")
    end = stopped + 3
    resumed = {"killed": (stopped, checkpoint("long", end))}
    damaged, straight = options("damaged"), options("straight")
    resumed["damaged"] = (2, checkpoint("straight"))
    summary, occupied = folder / "straight/run/summary.json", folder / "occupied"
    occupied.touch()
    sessions = [[*one, "--stop-at", str(end)] for one in (killed, long)]
    sessions += [straight, [*damaged, "--stop-at", "4"]]
    sessions += [["flip", str(checkpoint("damaged", 4) / "state.pt")], damaged]
    sessions += [straight, ["move", str(summary), f"{summary}.before"], straight]
    sessions += [["evaluate", str(folder / "straight/run"), "--data.root", str(tiny_rec)]]
    sessions += [arguments(occupied, tiny_rec)]
    last, full = str(ranks - 1), options("full")
    twice = options("twice full", "mpl", "--checkpoint-every", "1")
    sessions += [["full_disk", last, "2"], full, ["full_disk", last, "3", "4"], twice]
    sessions += [["full_disk", last], twice]
    resumed["twice full"] = (2, checkpoint("straight"))
    # From the sixth row on, each is a spike.
    diverging = ["--log-every", "1", "--spike-factor", "1e-9", "--on-spike", "rollback"]
    sessions += [[*options("diverging", "uda", *diverging), "--rollbacks", "1"]]
    if ranks == 1:
        for at in range(1, 6):
            one = options(f"stop{at}")
            sessions += [[*one, "--stop-at", str(at)], one]
            resumed[f"stop{at}"] = (at, checkpoint("straight"))
    else:
        elastic = options("elastic")
        assert train_here(*elastic, "--stop-at", "2").returncode == 0
        sessions += [[*elastic, "--stop-at", "4"]]
        start = folder / "start"
        assert train_here(*arguments(start, tiny_rec)).returncode == 0
        recipes = {name: options(name, name) for name in ALGORITHMS}
        recipes["norms of both ranks"] = options(
            "norms of both ranks", "mpl", "--model.norm", "sync"
        )
        recipes["taught"] = options("taught", "supervised", "--recipe", "noisy_student")
        recipes["taught"] += ["--algorithm.teacher", str(start)]
        recipes["tuned"] = options("tuned", "supervised", "--recipe", "finetune")
        recipes["tuned"] += ["--algorithm.start", str(start)]
        for name, one in recipes.items():
            kept = folder / name / "kept"
            move = ["move", str(checkpoint(name)), str(kept)]
            sessions += [[*one, "--checkpoint-every", "3"], move]
            sessions += [["move", str(start), f"{start} of before"]] if name == "tuned" else []
            sessions += [one]
            resumed[name] = (3, kept)
    done = run_in_turn(*sessions, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return Sessions(ranks, folder, resumed, done.stdout, done.stderr)


def test_a_run_goes_on_on_other_ranks(ended: Sessions) -> None:
    """From one to two and back: weights and results as they were, images in a new order, which
    itself resumes."""
    if ended.ranks == 1:
        pytest.skip("of two ranks")
    folder = ended.folder / "elastic/run"
    again = shutil.copytree(folder, ended.folder / "again/run")
    assert "ranks: 1 when it was written, now 2" in ended.out
    options = arguments(
        folder, Path(yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"])
    )
    last = train_here(*options)
    assert "ranks: 2 when it was written, now 1: all networks" in last.stdout
    assert [r["step"] for r in rows(folder) if "train_seconds" in r] == [2, 4, 6]
    paused = [*options[:-1], str(again)]
    for more in (["--stop-at", "5"], []):
        resumed = train_here(*paused, *more)
        assert resumed.returncode == 0, resumed.stderr
    assert "written by" not in resumed.stdout
    assert_same(final_state(folder), final_state(again), ignore=("seconds",))


def kill(options: list[str], ranks: int, folder: Path) -> None:
    """SIGKILL to what the user started, while a checkpoint after the first is being written.

    Under torchrun that is the launcher alone; its workers must follow, or they would train on.
    """
    process = subprocess.Popen(
        command(options, ranks),
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline, checkpoints = time.monotonic() + 600, folder / "checkpoints"
    while not (checkpoints_in(checkpoints) and [*checkpoints.glob(".writing_*/state.pt.tmp")]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    while alive(str(folder)):
        assert time.monotonic() < deadline, "a worker outlived its launcher"
        time.sleep(0.05)
    assert not (folder / "summary.json").exists()


def stop(options: list[str], ranks: int, folder: Path) -> int:
    """SIGTERM to the resumed run, or to torchrun, which passes it on and itself always ends with 1.

    It is sent after a checkpoint, which all ranks reach with their signal handlers. Returns the
    steps done.
    """
    before = set(folder.glob("checkpoints/step_*"))
    process = subprocess.Popen(
        command(options, ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and "resuming after step" in process.stdout.readline()
    assert "unlabeled images a step" in process.stdout.readline()
    deadline = time.monotonic() + 600
    while not set(folder.glob("checkpoints/step_*")) - before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == (75 if ranks == 1 else 1), err
    found = re.search(r"by a signal after step (\d+), saved: the same command resumes", out)
    assert found, out
    assert err.count("train: stopping: saves a checkpoint after this step") == 1
    return int(found[1])


def alive(word: str) -> list[str]:
    """Processes with a word in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes():
                found.append(file.parent.name)
    return found


def test_resumed_runs_end_as_uninterrupted_ones(ended: Sessions) -> None:
    for name, (step, expected) in ended.resumed.items():
        folder = ended.folder / name / "run"
        assert f"resuming after step {step} from {folder}" in ended.out
        state = torch.load(expected / "state.pt", weights_only=True)
        assert_same(state, final_state(folder, state["step"]), name, ignore=("seconds",))
        if "baseline" in state["algorithm"]:
            assert state["algorithm"]["baseline"] != 0  # or it would prove nothing


def test_rows_of_resumed_runs_are_those_of_uninterrupted_ones(ended: Sessions) -> None:
    steps = [r["step"] for r in rows(ended.folder / "killed/run") if "train_seconds" in r]
    stopped, _ = ended.resumed["killed"]
    assert steps == sorted({*range(2, stopped + 3, 2), stopped, stopped + 3})
    evaluated = {
        name: [r for r in rows(ended.folder / name / "run") if "eval/top1" in r]
        for name in ("straight", *ended.resumed)
    }
    for name, (_, expected) in ended.resumed.items():
        if expected.is_relative_to(ended.folder / "straight"):
            assert evaluated[name] == evaluated["straight"]
    if ended.ranks == 2:  # what is tuned was trained by one rank
        start = json.loads((ended.folder / "start of before/summary.json").read_text())
        assert [r["step"] for r in evaluated["tuned"]] == [0, 4, 6]
        assert evaluated["tuned"][0]["eval/top1"] == start["top1"]


def test_damaged_newest_checkpoint_falls_back_with_one_warning(ended: Sessions) -> None:
    lines = ended.err.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning:") and "damaged" in line]
    assert "step_00000004 is damaged" in warning and "to step_00000002" in warning


def test_a_full_disk_is_a_warning_and_the_second_time_an_error(ended: Sessions) -> None:
    """Of the last rank; all ranks end."""
    rank = ended.ranks - 1
    whose = f"rank {rank}: " if rank else ""
    full, twice = (ended.folder / name / "run" for name in ("full", "twice full"))

    def reason(run: Path, step: int) -> str:
        file = f"{run}/checkpoints/.writing_step_{step:08d}/rank_{rank}.pt"
        return f"No space left on device ({file}); earlier ones are"

    warning = f"warning: {whose}the checkpoint of step 2 was not written: {reason(full, 2)} kept\n"
    assert ended.err.count(warning) == 1
    assert_same(final_state(full), final_state(ended.folder / "straight/run"), ignore=("seconds",))
    error = f"the checkpoints of steps 3 and 4 cannot be written: {reason(twice, 4)} untouched\n"
    assert all(ended.err.count(f"rank {rank}: {error}") == 1 for rank in range(ended.ranks))


def test_a_complete_run_says_so_and_a_lost_summary_is_made_good(ended: Sessions) -> None:
    """A kill may come between the last checkpoint and the summary."""
    straight = ended.folder / "straight/run"
    before, after = (
        json.loads((straight / name).read_text())
        for name in ("summary.json.before", "summary.json")
    )
    assert after == before
    assert ended.out.count(f"complete already: top-1 {before['top1']:.2f} % in {straight}") == 1
    line = "step_00000006: top-1 {top1:.2f} %, top-5 {top5:.2f} % of 50 images\n".format(**before)
    assert ended.out.count(f"{straight}/checkpoints/{line}") == 1  # of tools/evaluate.py


def test_all_ranks_have_the_error_of_the_first(ended: Sessions) -> None:
    occupied = f"run_dir {ended.folder}/occupied cannot be written: is a file"  # lines may mix
    assert all(ended.err.count(f"rank {rank}: {occupied}") == 1 for rank in range(ended.ranks))


def test_all_ranks_roll_back_together(ended: Sessions) -> None:
    checkpoint = f"{ended.folder}/diverging/run/checkpoints/step_00000004"
    line = f"rollback 1 of at most 1: back from step 6 to {checkpoint}, with the images"
    assert ended.out.count(line) == 1
    error = "loss/labeled is"  # at the next row
    assert all(ended.err.count(f"rank {rank}: {error}") == 1 for rank in range(ended.ranks))
    found = [event["event"] for event in events(ended.folder / "diverging/run")]
    assert found == ["started", "checkpoint", "checkpoint", "rollback", "checkpoint", "failed"]


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
    restore(moving, old | {"algorithm": {"baseline": torch.tensor(0.5)}}, tmp_path)
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
