"""What `mpl_fast.load` returns predicts as the run's own evaluation does."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mpl_fast
from mpl_fast.data.manifest import read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import CheckpointError, DataError, UserError
from mpl_fast.inference.trained import Ensemble
from mpl_fast.training.build import eval_loader
from tests.tiny_run import arguments, launch, train_here

pytestmark = pytest.mark.slow


def top1(trained: mpl_fast.Trained, rec: Path) -> float:
    batches = eval_loader(trained.config, read_manifest(rec), DistEnv(0, 1, trained.device))
    hits = [
        (trained(images).argmax(1) == labels)[:count].sum().item()
        for images, labels, count in batches
    ]
    return 100.0 * sum(hits) / 50


@pytest.mark.parametrize("recipe", ["mpl", "mpl_roleplay"])
def test_accuracy_is_that_of_the_run(
    recipe: str, tiny_rec: Path, tiny_trained: Path, tmp_path: Path
) -> None:
    run = tiny_trained if recipe == "mpl" else tmp_path / "run"
    if run != tiny_trained:
        assert train_here(*arguments(run, tiny_rec, recipe=recipe)).returncode == 0
    trained = mpl_fast.load(run)
    summary = json.loads((run / "summary.json").read_text())
    assert top1(trained, tiny_rec) == summary["top1"] == trained.accuracy["top1"]
    assert trained.step == 6
    assert trained.classes == read_manifest(tiny_rec).classes
    assert isinstance(trained.network, Ensemble) == (recipe == "mpl_roleplay")


def test_the_mean_of_an_ensemble() -> None:
    torch.manual_seed(0)
    members, images = [torch.nn.Linear(4, 3) for _ in range(2)], torch.randn(5, 4)
    logits = [member(images) for member in members]
    by_probability = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    by_logits = (logits[0] + logits[1]).div(2).softmax(1)
    for mean_of, expected in (("probability", by_probability), ("logits", by_logits)):
        found = Ensemble(members, mean_of)(images).softmax(1)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


PLAIN = ("--data.image-size", "11", "--data.interpolation", "bilinear", "--data.antialias", "false")


@pytest.mark.parametrize("options", [(), PLAIN])
def test_transform_gives_what_the_pipeline_gives(
    options: tuple[str, ...], tiny_trained: Path, tiny_rec: Path
) -> None:
    """Up to the JPEG decoder's rounding; `data.crop` of these images is pad_crop."""
    trained = mpl_fast.load(tiny_trained, pipeline=options)
    manifest = read_manifest(tiny_rec)
    images, *_ = next(iter(eval_loader(trained.config, manifest, DistEnv(0, 1, trained.device))))
    val = SplitImages(manifest.splits["val"])
    ours = torch.stack([trained.transform(Image.open(io.BytesIO(val.image(i)))) for i in range(4)])
    step = 1 / 255 / min(trained.config.data.std)
    assert (ours - images[:4]).abs().max() < 3 * step
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)  # of 16 bits, Pillow clips it
    ours = trained.transform(Image.fromarray(gray.astype(np.uint16) << 8))
    torch.testing.assert_close(ours, trained.transform(Image.fromarray(gray)))
    assert ours.dtype == torch.float32


def test_features_are_what_the_last_layer_gets(tiny_trained: Path) -> None:
    trained, images = mpl_fast.load(tiny_trained), torch.randn(3, 3, 16, 16)
    logits, features = trained.logits_and_features(images)
    head = trained.network.get_classifier()  # type: ignore[operator]
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(trained(images), logits.softmax(1))


def test_without_the_records(tiny_trained: Path) -> None:
    here = mpl_fast.load(tiny_trained)
    gone = mpl_fast.load(tiny_trained, pipeline=["--data.root", "/nowhere"])
    assert gone.classes == here.classes


def test_no_run_and_no_checkpoint(tmp_path: Path, tiny_trained: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml does not exist: name a run directory"):
        mpl_fast.load(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-best"):
        mpl_fast.load(tiny_trained, checkpoint="best")


def test_fit_trains_resumes_and_loads(tiny_rec: Path, tmp_path: Path) -> None:
    _, config, *_ = arguments(tmp_path / "x", tiny_rec, recipe="supervised")
    options = {"data.root": tiny_rec, "run_dir": tmp_path / "run", "data.mean": (0.5, 0.5, 0.5)}
    assert mpl_fast.fit(config, options | {"stop_at": 2}).step == 2
    trained = mpl_fast.fit(config, options)
    assert trained.step == 6
    assert trained.config.data.mean == (0.5, 0.5, 0.5)
    assert mpl_fast.fit(config, options).step == 6
    with pytest.raises(UserError, match="labeled_batch"):
        mpl_fast.fit(config, options | {"labeled_batch": 0})


def test_two_ranks_fit_load_and_fit_again(tiny_rec: Path, tmp_path: Path) -> None:
    _, config, *_ = arguments(tmp_path / "x", tiny_rec, recipe="supervised")
    options = {"data.root": str(tiny_rec), "run_dir": str(tmp_path / "run"), "steps": 2}
    done = launch("tests.inference.test_trained", json.dumps([config, options]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, then 1") == 2


def fit_twice(config: str, options: dict[str, object]) -> None:
    """On each rank of one process group."""
    fitted = mpl_fast.fit(config, options)
    assert mpl_fast.load(str(options["run_dir"])).accuracy == fitted.accuracy
    options |= {"run_dir": f"{options['run_dir']}_again", "steps": 1}
    print(f"{fitted.step} steps, then {mpl_fast.fit(config, options).step}\n", end="")


if __name__ == "__main__":
    fit_twice(*json.loads(sys.argv[1]))
