"""Labels mean classes by their names: on other packs, after a stop, in weights to start from."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from mpl_fast import train
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import run_command
from tests.packing.packs import make_tree, pack
from tests.tiny_run import arguments, final_state, replace_state, rows, run_here, train_here

COLORS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255), "dog": (255, 255, 255)}
STEPS = 30
CHECKPOINT = f"step_{STEPS:08d}"


class Trained(NamedTuple):
    """A folder of packs of plain colors, and the run that was trained on `same`."""

    packs: Path
    run: Path


def png(color: np.typing.NDArray[np.int64]) -> bytes:
    return bytes(cv2.imencode(".png", np.full((16, 16, 3), color, np.uint8))[1])


def colored(folder: Path, names: dict[str, str]) -> Path:
    """Images of the classes `names`, each of the color of a class, in train and val."""
    images = {
        f"{split}/{name}/{number}.png": png(np.array(COLORS[color]) * (9 - number) // 9)
        for split, count in (("train", 6), ("val", 4))
        for name, color in names.items()
        for number in range(count)
    }
    return make_tree(folder, images)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("colors")
    same = {name: name for name in COLORS}
    kinds = {
        "same": same,
        "part": {"bee": "bee", "dog": "dog"},
        "more": same | {"emu": "ant", "fly": "bee"},
        "other": {"ant": "ant", "bee": "bee", "cat": "cat", "eel": "dog"},
    }
    for kind, names in kinds.items():
        images = colored(folder / f"images {kind}", names)
        given = ("--src", images / "train", "--val", images / "val", "--labeled", "all")
        pack(*given, out=folder / kind)
    images = folder / "images same"
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"))
        listed = [(3 - [*COLORS].index(f.parent.name), f.relative_to(images)) for f in files]
        lines = [f"{number}\t{label}\t{name}\n" for number, (label, name) in enumerate(listed)]
        (images / f"{split}.lst").write_text("".join(lines))
    given = ("--src", images / "train.lst", "--val", images / "val.lst", "--labeled", "all")
    pack(*given, out=folder / "turned")
    assert read_manifest(folder / "turned").classes == (*reversed(COLORS),)
    done = train_here(*options(folder / "run", folder / "same"))
    assert done.returncode == 0, done.stderr
    return Trained(folder, folder / "run")


def options(run: Path, data: Path) -> list[str]:
    made = arguments(run, data, recipe="supervised")
    return [*made, "--steps", str(STEPS), "--eval-every", "0", "--checkpoint-every", "20"]


def evaluate() -> None:
    from tools.evaluate import main

    run_command("evaluate", main)


def evaluated(run: Path, data: Path) -> tuple[float, str]:
    """Top-1 that evaluate.py prints, and all that it prints."""
    done = run_here(evaluate, [str(run), "--data.root", str(data)])
    assert done.returncode == 0, done.stderr
    found = re.search(r"top-1 ([\d.]+) %", done.stdout)
    assert found
    return float(found[1]), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("same", ""),
        ("turned", "the network's classes in another order: labels are mapped by name"),
        (
            "part",
            "2 of the network's 4 classes: labels are mapped by name, guesses are among all 4",
        ),
    ],
)
def test_evaluation_maps_labels_by_name(data: str, line: str, trained: Trained) -> None:
    top1, printed = evaluated(trained.run, trained.packs / data)
    assert top1 == 100
    assert printed.count("\n") == (2 if line else 1)
    assert not line or f"{trained.packs / data} has {line}\n" in printed
    count = 8 if data == "part" else 16
    assert f"top-5 100.00 % of {count} images" in printed


def test_a_checkpoint_without_names_is_evaluated_with_a_warning(
    trained: Trained, tmp_path: Path
) -> None:
    run = without_names(trained.run, tmp_path / "run")
    top1, printed = evaluated(run, trained.packs / "turned")
    assert top1 == 0  # as four labels in reverse order are
    assert "was written before class names were stored: labels are taken as they are" in printed


def without_names(run: Path, to: Path) -> Path:
    """A copy of a run as an earlier version wrote it."""
    file = shutil.copytree(run, to) / "checkpoints" / CHECKPOINT / "state.pt"
    state = final_state(run, STEPS)
    assert state.pop("classes") == [*COLORS]
    replace_state(file, state)
    return to


def refused(code: int, main: Callable[[], object], *given: object) -> str:
    done = run_here(main, [*map(str, given)])
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_classes_that_the_network_lacks_are_not_evaluated(trained: Trained) -> None:
    for data, words in {
        "more": "2 of its 6 classes (emu, fly)", "other": "1 of its 4 classes (eel)"
    }.items():  # fmt: skip
        text = refused(4, evaluate, trained.run, "--data.root", trained.packs / data)
        assert f"{words} are not among the 4 that {trained.run}" in text
    text = refused(2, evaluate, trained.run, "--model.classes", "5")
    assert "model.classes is 5 but the checkpoint in" in text and "has 4 classes: set 4" in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("turned", "label 0 is 'ant' there and 'dog' here"),
        ("other", "label 3 is 'dog' there and 'eel' here"),
        ("more", "label 4 is no class there and 'emu' here"),
    ],
)
def test_resuming_needs_the_same_classes(
    data: str, words: str, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / CHECKPOINT)
    config = (run / "config.yaml").read_text()
    text = refused(6, train.main, *options(run, trained.packs / data))
    assert (run / "config.yaml").read_text() == config
    assert f"step_00000020 was trained on other classes than {trained.packs / data}" in text
    assert words in text


def tuning(run: Path, data: Path, start: Path) -> list[str]:
    made = [*options(run, data), "--steps", "1"]
    return [*made, "--recipe", "finetune", "--algorithm.start", str(start)]


@pytest.mark.parametrize("weights", ["average", "network"])
def test_fine_tuning_maps_the_head_by_name(weights: str, trained: Trained, tmp_path: Path) -> None:
    given = tuning(tmp_path / "run", trained.packs / "turned", trained.run)
    done = train_here(*given, "--algorithm.weights", weights)
    assert done.returncode == 0, done.stderr
    assert "; its classes are in another order and were mapped by name\n" in done.stdout
    assert rows(tmp_path / "run")[0]["eval/top1"] == 100


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("other", "(only trained: dog; only here: eel)"),
        ("more", "(only here: emu, fly)"),
        ("part", "(only trained: ant, cat)"),
    ],
)
def test_fine_tuning_needs_the_same_classes(
    data: str, words: str, trained: Trained, tmp_path: Path
) -> None:
    given = tuning(tmp_path / "run", trained.packs / data, trained.run)
    text = refused(6, train.main, *given)
    assert f"{CHECKPOINT} is of other classes than this data {words}; for a new last layer" in text
    head = given[: given.index("--recipe")]
    (file,) = re.findall(r"--model.pretrained (\S+)", text)
    done = train_here(*head, "--model.pretrained", file)
    assert done.returncode == 0, done.stderr
    assert f"begins with the weights of {file}; the last layer is new: " in done.stdout


def test_fine_tuning_from_an_old_run_is_a_warning(trained: Trained, tmp_path: Path) -> None:
    start = without_names(trained.run, tmp_path / "old")
    done = train_here(*tuning(tmp_path / "run", trained.packs / "turned", start))
    assert "was written before class names were stored: labels are taken as" in done.stderr
    assert rows(tmp_path / "run")[0]["eval/top1"] == 0
