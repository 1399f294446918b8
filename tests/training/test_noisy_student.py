"""A fixed teacher is the network that another run evaluates, and stays it."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpl_fast.algorithms.base import predict
from mpl_fast.config import NoisyStudentConfig, RunConfig
from mpl_fast.config.command_line import parse
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import CheckpointError, ConfigError, UserError
from mpl_fast.training.auto import plain
from mpl_fast.training.build import build_algorithm
from mpl_fast.training.checkpoint import read_shared
from mpl_fast.training.state import restore
from mpl_fast.training.teacher import LoadedTeacher, load_teacher
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, final_state, rows, run_in_turn, train_here

DIGITS = [*"0123456789"]
CPU = torch.device("cpu")
FP32 = "--precision=fp32"  # as `expected` values are


@pytest.fixture(scope="module")
def teachers(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that teach: one network, and two of which logits are averaged."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, more in {
        "supervised": [],
        "mpl_roleplay": ["--algorithm.ensemble", "logits"],
    }.items():
        done = train_here(*arguments(folder / name, tiny_rec, recipe=name), FP32, *more)
        assert done.returncode == 0, done.stderr
    return folder


def options(folder: Path, rec: Path, teacher: Path, *more: str) -> list[str]:
    made = [*arguments(folder, rec, recipe="supervised"), FP32]
    return [*made, "--recipe", "noisy_student", "--algorithm.teacher", str(teacher), *more]


def loaded(
    folder: Path, teacher: Path, rec: Path, *more: str, classes: list[str] = DIGITS
) -> LoadedTeacher:
    """The teacher of a fresh run."""
    config = plain(parse(options(folder / "run", rec, teacher, *more)))
    assert isinstance(config.algorithm, NoisyStudentConfig)
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    return load_teacher(config, config.algorithm, classes, CPU, fresh=True)


def evaluated(run: Path, rec: Path, images: torch.Tensor, **changes: str) -> torch.Tensor:
    """The probabilities of what a run evaluates."""
    config: RunConfig = plain(parse(["--config", str(run / "config.yaml")]))
    if changes:
        config = replace(config, algorithm=replace(config.algorithm, **changes))  # type: ignore[arg-type]
    algorithm = build_algorithm(config, read_manifest(rec), 10, CPU, fresh=False)
    (checkpoint,) = run.glob("checkpoints/step_00000006")
    restore(algorithm, read_shared(checkpoint), checkpoint)
    return predict(algorithm, images)


@pytest.mark.parametrize(
    ("name", "ensemble"),
    [("supervised", ""), ("mpl_roleplay", "logits"), ("mpl_roleplay", "probability")],
)
def test_labels_are_what_the_other_run_would_evaluate(
    name: str, ensemble: str, teachers: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    run, images = shutil.copytree(teachers / name, tmp_path / name), torch.randn(7, 3, 16, 16)
    changes = {"ensemble": ensemble} if ensemble else {}
    config = run / "config.yaml"
    config.write_text(re.sub("ensemble: .*", f"ensemble: {ensemble}", config.read_text()))
    found = loaded(tmp_path, run, tiny_rec)
    assert not found.warnings and f" of {run} after step 6" in found.message
    learners = ["learner"] if name == "supervised" else ["first", "second"]
    assert [f"the average of {x}" in found.message for x in learners] == [True] * len(learners)
    expected = evaluated(run, tiny_rec, images, **changes)
    assert expected.std() > 1e-3  # the labels differ, or all of this would prove nothing
    torch.testing.assert_close(found.teacher(images).softmax(-1), expected)
    turned = loaded(tmp_path, run, tiny_rec, classes=DIGITS[::-1])
    assert "; its classes are in another order and were mapped by name" in turned.message
    torch.testing.assert_close(turned.teacher(images).softmax(-1), expected.flip(1))


def test_images_of_another_size_and_normalization_are_adapted(
    teachers: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    """Images of one color are the same at any size."""
    run, colors = teachers / "supervised", torch.rand(5, 3, 1, 1)
    expected = loaded(tmp_path, run, tiny_rec).teacher(
        ((colors - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).expand(5, 3, 16, 16)
    )  # fmt: skip
    other = ["--data.image-size", "24", "--data.mean", "[0.1,0.2,0.3]", "--data.std", "[0.5,0.6,1]"]
    found = loaded(tmp_path, run, tiny_rec, *other)
    assert "; for it weak views are resized to its 16 pixels and normalized by" in found.message
    images = (colors - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 1.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(found.teacher(images.expand(5, 3, 24, 24)), expected)


def test_a_resumed_run_keeps_its_teacher_whatever_becomes_of_the_other_run(
    teachers: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    """Another run is at its place. The student is a larger network, and teaches the next one."""
    first = shutil.copytree(teachers / "supervised", tmp_path / "first")
    other = shutil.copytree(teachers / "mpl_roleplay", tmp_path / "other")
    larger = ["--model.name", "shake_shake_8_8"]
    straight, stopped = (
        options(tmp_path / name, tiny_rec, first, *larger) for name in ("straight", "stopped")
    )
    third = options(tmp_path / "third", tiny_rec, tmp_path / "straight", "--steps", "2")
    done = run_in_turn(
        straight,
        [*stopped, "--stop-at", "3"],
        ["move", str(first), str(tmp_path / "gone")],
        ["move", str(other), str(first)],
        stopped,
        third,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count(f"the teacher is wrn_10_1, the average of learner of {first}") == 3
    assert "the teacher is shake_shake_8_8, the average of learner of" in done.stdout
    assert_same(
        final_state(tmp_path / "stopped"), final_state(tmp_path / "straight"), ignore=("seconds",)
    )
    row = next(row for row in rows(tmp_path / "straight") if "loss/student" in row)
    assert row["loss/student"] > 0 and 0 < row["mask_rate"] <= 1

    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "teacher")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000006")
    done = train_here(*stopped)
    assert done.returncode == 6 and "/checkpoints/teacher is gone, the copy of" in done.stderr


def test_a_run_that_cannot_teach_is_one_line(
    teachers: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    run, empty = teachers / "supervised", tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    cases: dict[str, tuple[type[UserError], Path, list[str]]] = {
        f"algorithm.teacher: there is no folder {tmp_path}/none": (
            ConfigError, tmp_path / "none", DIGITS,
        ),
        f"algorithm.teacher: {empty}/checkpoints holds no usable checkpoint (nothing has": (
            CheckpointError, empty, DIGITS,
        ),
        "step_00000006 is of other classes than this data (only trained: 9; only here: ten)": (
            CheckpointError, run, [*DIGITS[:9], "ten"],
        ),
    }  # fmt: skip
    for words, (kind, teacher, classes) in cases.items():
        with pytest.raises(kind) as error:
            loaded(tmp_path, teacher, tiny_rec, classes=classes)
        assert words in str(error.value) and "\n" not in str(error.value)
    old = shutil.copytree(run, tmp_path / "old")
    (old / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be copied .*old/config.yaml: No such file"):
        loaded(tmp_path, old, tiny_rec)
