"""Training on packs in which no unlabeled image, or only some, have a label."""

import math
from pathlib import Path
from unittest import mock

import pytest

from mpl_fast.algorithms.base import Metrics
from mpl_fast.config import RECIPES, DataConfig
from mpl_fast.data import contact_sheet
from mpl_fast.data.manifest import read_manifest
from mpl_fast.training.metrics import Meter, Wait
from tests.packing.packs import pack
from tests.tiny_run import ALGORITHMS, arguments, rows, train_here, write_digits

SHORT = ("--steps", "2", "--eval-every", "2", "--checkpoint-every", "2")
NAMES = ["supervised", "uda", "fixmatch", "mpl", "mpl exact", "mpl parity_kekmodel"]
NAMES += ["mpl parity_google", "mpl_roleplay", "smpl", "metasemi"]
OF_ANOTHER_RUN = {"finetune": "start", "noisy_student": "teacher"}  # recipes, and the key of it


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 labeled digits and 40 of nobody, 50 to validate; packs `none` and `some`."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, train=70)
    for number in range(30, 70):
        (file,) = (folder / "train").glob(f"*/{number}.jpg")
        target = folder / "pool" / ("deep/er" if number % 2 else ".") / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    args = ("--src", folder / "train", "--val", folder / "val", "--unlabeled-src", folder / "pool")
    pack(*args, "--unlabeled", "rest", out=folder / "none")
    pack(*args, out=folder / "some")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_recipes_train_without_any_label_of_unlabeled_images(
    name: str, digits: Path, tmp_path: Path
) -> None:
    done = train_here(*arguments(tmp_path / "run", digits / "none", recipe=name), *SHORT)
    assert done.returncode == 0, done.stderr
    row = next(row for row in rows(tmp_path / "run") if "loss/labeled" in row)
    assert "accuracy/pseudo" not in row
    assert all(math.isfinite(value) for value in row.values())
    if name == "supervised":
        for recipe, key in OF_ANOTHER_RUN.items():
            later = arguments(tmp_path / recipe, digits / "none", recipe=name)
            later += ["--recipe", recipe, f"--algorithm.{key}", str(tmp_path / "run")]
            done = train_here(*later, *SHORT)
            assert done.returncode == 0, done.stderr


def test_every_recipe_is_tested() -> None:
    assert {*NAMES} <= ALGORITHMS.keys()
    assert {name.split()[0] for name in NAMES} | {*OF_ANOTHER_RUN} == set(RECIPES)


def test_the_accuracy_is_that_of_images_with_a_label(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 steps of 8 images, of 70, of which 30 have a label: one mean over all of those."""
    added, add = [], Meter.add

    def noted(self: Meter, metrics: Metrics, wait: Wait, exchanged: float) -> None:
        added.append(metrics["accuracy/pseudo"].tolist())
        add(self, metrics, wait, exchanged)

    monkeypatch.setattr(Meter, "add", noted)
    run = arguments(tmp_path / "run", digits / "some", recipe="fixmatch")
    once = ("--log-every", "6", "--eval-every", "6", "--checkpoint-every", "6")
    done = train_here(*run, *once)
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in rows(tmp_path / "run") if "loss/labeled" in row)
    right, known = (sum(column) for column in zip(*added, strict=True))
    assert len(added) == 6 and 8 < known < 40 and 0 <= right <= known
    assert row["accuracy/pseudo"] == pytest.approx(right / known)


def test_contact_sheet_says_which_have_no_label(digits: Path, tmp_path: Path) -> None:
    manifest, config = read_manifest(digits / "some"), DataConfig(image_size=16)
    with mock.patch.object(contact_sheet, "_arrange") as arrange:
        out = tmp_path / "sheet.png"
        contact_sheet.contact_sheet(config, manifest, out, images=30, draws=1, seed=0)
    names = arrange.call_args.args[2]
    assert "no label" in names and {*names} - {"no label"} <= {*manifest.classes}
    assert 5 < len([name for name in names if name != "no label"]) < 25
