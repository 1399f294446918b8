"""What a run begins with: another run's weights, to be fine-tuned, or those of a file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpl_fast import models
from mpl_fast.config import FinetuneConfig, LearnerConfig, RunConfig
from mpl_fast.errors import CheckpointError
from mpl_fast.learner import Learner
from mpl_fast.training.same_config import other_images
from mpl_fast.training.trained import load_start
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, final_state, rows, run_in_turn, train_here

DIGITS = [*"0123456789"]


@pytest.fixture(scope="module")
def starts(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs to be tuned: Meta Pseudo Labels, two role players, and one without an average."""
    folder = tmp_path_factory.mktemp("starts")
    for name in ("mpl", "mpl_roleplay", "supervised"):
        plain = ["--algorithm.learner.ema", "0"] if name == "supervised" else []
        done = train_here(*arguments(folder / name, tiny_rec, recipe=name), *plain)
        assert done.returncode == 0, done.stderr
    return folder


def fresh(ema: float = 0.0) -> Learner:
    torch.manual_seed(3)
    return Learner(models.build("wrn_10_1", 10), LearnerConfig(ema=ema), steps=6)


def assert_is(network: torch.nn.Module | None, expected: dict[str, Tensor]) -> None:
    assert network is not None
    assert_same({**network.state_dict()}, {**expected})


@pytest.mark.parametrize(
    ("run", "weights", "name", "taken"),
    [
        ("mpl", "average", "student", "average"),
        ("mpl", "network", "student", "network"),
        ("mpl_roleplay", "average", "second", "average"),
        ("supervised", "average", "learner", "network"),
    ],
)
def test_tuning_begins_with_the_network_that_was_evaluated(
    run: str, weights: Any, name: str, taken: str, starts: Path
) -> None:
    """All of its tensors, batch-norm statistics too; the optimizer is a fresh one."""
    config = FinetuneConfig(start=str(starts / run), weights=weights)
    learner = fresh(ema=0.5)
    message, warnings = load_start(config, learner, "wrn_10_1", DIGITS)
    state = final_state(starts / run)["learners"][name]
    assert_is(learner.network, state[taken])
    assert_is(learner.average, state[taken])
    gathered = learner.optimizer.state.values()
    assert gathered and not any(state["momentum_buffer"].any() for state in gathered)
    assert not warnings and f"the {taken} of {name} after step 6" in message
    if run == "mpl":
        differ = [not torch.equal(v, state["network"][k]) for k, v in state["average"].items()]
        assert any(differ)  # or the two would be equal


@pytest.fixture(scope="module")
def tuned(starts: Path, tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one go; stopped, and resumed where the start is no longer to be found; and without a
    change, neither of weights nor of statistics. 20 labels in batches of 4 are 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("tuned")
    start = shutil.copytree(starts / "mpl", folder / "start")

    def options(name: str, *more: str) -> list[str]:
        made = arguments(folder / name, tiny_rec, recipe="supervised")
        made += ["--recipe", "finetune", "--algorithm.start", str(start)]
        return [*made, "--epochs", "1.5", "--eval-epochs", "0.5", *more]

    still = options("still", "--algorithm.learner.lr", "0", "--model.frozen", "true")
    stopped, pause = options("stopped"), ["--stop-at", "3"]
    done = run_in_turn(
        options("straight"),
        [*stopped, *pause],
        [*still, *pause],
        ["move", str(start), str(folder / "start of before")],
        stopped,
        still,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"begins with the average of student after step 6, .*/start/", done.stdout)
    assert done.stdout.count("resuming after step 3") == 2
    (folder / "output.txt").write_text(done.stdout)
    return folder


def evaluations(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["eval/top1"]) for r in rows(folder) if "eval/top1" in r]


def test_tuning_lasts_its_epochs_and_resumes_without_its_start(tuned: Path, starts: Path) -> None:
    """1.5 epochs of 5 steps, evaluated before them and each half epoch."""
    found = evaluations(tuned / "straight")
    assert [step for step, _ in found] == [0, 3, 6, 8]
    assert found[0][1] == json.loads((starts / "mpl" / "summary.json").read_text())["top1"]
    assert evaluations(tuned / "stopped") == found
    straight, stopped = (final_state(tuned / name, 8) for name in ("straight", "stopped"))
    assert_same(straight, stopped, ignore=("seconds",))


@pytest.mark.parametrize("name", ["straight", "stopped", "still"])
def test_best_and_last_are_both_reported(name: str, tuned: Path) -> None:
    found = evaluations(tuned / name)
    best = max(top1 for _, top1 in found)
    at = next(step for step, top1 in found if top1 == best)
    summary = json.loads((tuned / name / "summary.json").read_text())
    assert (summary["best_top1"], summary["best_step"]) == (best, at)
    assert summary["top1"] == found[-1][1]
    assert final_state(tuned / name, 8)["best"] == {"best_top1": best, "best_step": at}
    line = f"done: top-1 {found[-1][1]:.2f} % (best {best:.2f} % at step {at})"
    assert line in (tuned / "output.txt").read_text()
    if name == "still":  # the first of equals, which is before the stop
        assert at == 0 and summary["top1"] == best


def test_a_start_of_other_images_is_a_warning(starts: Path, tiny_rec: Path, tmp_path: Path) -> None:
    start, default = shutil.copytree(starts / "mpl", tmp_path / "start"), [0.485, 0.456, 0.406]
    config = start / "config.yaml"
    config.write_text(config.read_text().replace("image_size: 16", "image_size: 32"))
    options = arguments(tmp_path / "run", tiny_rec, recipe="supervised")
    options += ["--recipe", "finetune", "--algorithm.start", str(start)]
    done = train_here(*options, "--stop-at", "1", "--data.mean", "[0.5,0.5,0.5]")
    assert done.returncode == 0 and done.stderr == (
        f"warning: {start} was trained on other images: data.image_size was 32 and is 16, "
        f"data.mean was {default} and is [0.5, 0.5, 0.5]; give its values if not meant\n"
    )
    config.write_text("data: [")
    done = train_here(*options, "--run-dir", str(tmp_path / "other"))
    assert done.returncode == 2 and f"{config} is not YAML: while parsing" in done.stderr
    config.unlink()
    assert other_images(str(start), RunConfig()) == ""


def test_a_start_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError) as error:
        load_start(FinetuneConfig(start=str(tmp_path)), fresh(), "wrn_10_1", DIGITS)
    assert str(error.value) == (
        f"algorithm.start: {tmp_path}/checkpoints holds no usable checkpoint (nothing has been "
        "saved there): give the run directory of a run that has trained"
    )


def test_a_start_of_another_network_is_one_line(starts: Path) -> None:
    config = FinetuneConfig(start=str(starts / "mpl"))
    others = {"wrn_28_2": 10, "convlarge": 10, "wrn_10_1": 7}
    for name, classes in others.items():
        other = Learner(models.build(name, classes), LearnerConfig(), steps=6)
        with pytest.raises(CheckpointError) as error:
            load_start(config, other, name, DIGITS)
        text = str(error.value)
        assert "step_00000006 is of another network" in text and f"model.name {name}" in text
        assert f"{starts}/mpl/config.yaml" in text and "\n" not in text


def test_a_damaged_start_falls_back_with_a_warning(starts: Path, tmp_path: Path) -> None:
    start = shutil.copytree(starts / "mpl", tmp_path / "start")
    file = start / "checkpoints" / "step_00000006" / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])
    learner = fresh()
    message, warnings = load_start(FinetuneConfig(start=str(start)), learner, "wrn_10_1", DIGITS)
    assert "after step 4" in message
    assert len(warnings) == 1 and "step_00000006 is damaged" in warnings[0]
    assert_is(learner.network, final_state(start, 4)["learners"]["student"]["average"])


@pytest.mark.parametrize(
    ("recipe", "file"), [("mpl exact", "trunk.safetensors"), ("mpl_roleplay", "trunk.pth")]
)
def test_transfer_trains_the_head_alone(
    recipe: str, file: str, tiny_rec: Path, tmp_path: Path
) -> None:
    """Weights of a file, its trunk frozen: after the run it is bit for bit the file's."""
    torch.manual_seed(5)
    source = models.build("wrn_10_1", 10).state_dict()
    for key, value in source.items():
        if "running" in key:
            value.add_(0.25)
    save: dict[str, Callable[[Any, Path], object]] = {".safetensors": save_file, ".pth": torch.save}
    save[Path(file).suffix](source, tmp_path / file)
    options = arguments(tmp_path / "run", tiny_rec, recipe=recipe)
    options += ["--model.pretrained", str(tmp_path / file), "--model.frozen", "true"]
    move = ["move", str(tmp_path / file), str(tmp_path / "gone")]  # a checkpoint holds all of it
    done = run_in_turn([*options, "--stop-at", "3"], move, options)
    assert done.returncode == 0, done.stderr
    trunk = {k for k in source if not k.startswith("head.")}
    assert len(trunk) > 20 and len(source) - len(trunk) == 2
    for learner in final_state(tmp_path / "run")["learners"].values():
        for part in ("network", "average"):
            assert all(torch.equal(learner[part][key], source[key]) for key in trunk)
            assert not torch.equal(learner[part]["head.weight"], source["head.weight"])
