"""Exported networks give the logits of the run's network, where this package is not installed."""

import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import mpl_fast
from mpl_fast import models
from mpl_fast.config import DataConfig, RunConfig
from mpl_fast.data.manifest import read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.errors import ConfigError, OutputError, run_command
from mpl_fast.inference.export import FORMATS, export
from mpl_fast.inference.model_card import _images
from mpl_fast.inference.trained import Ensemble, transform_of
from mpl_fast.models.frozen import FrozenNorm
from mpl_fast.training.build import build_network
from tests.tiny_run import run_here
from tools.export import main

pytestmark = pytest.mark.slow
RESNET, VIT = "test_resnet.r160_in1k", "test_vit.r160_in1k"  # timm's own small test networks


def with_network(
    trained: mpl_fast.Trained, name: str, side: int = 32, *, frozen: bool = False
) -> mpl_fast.Trained:
    """The same run with another network, with random weights and statistics, and that crops
    images as for ImageNet."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        trained.config,
        data=dataclasses.replace(trained.config.data, image_size=side, crop="random_resized"),
        model=dataclasses.replace(trained.config.model, name=name, frozen=frozen),
    )
    network = build_network(config, 10).eval().requires_grad_(False)
    for value in network.state_dict().values():
        if value.ndim == 1:  # of norms, and biases
            value.add_(0.1 * torch.rand_like(value))
    return dataclasses.replace(
        trained, network=network, config=config, transform=transform_of(config)
    )


@pytest.fixture(scope="module")
def jpegs(tiny_rec: Path) -> list[bytes]:
    """Fifty photographs of ImageNet, or where they are not, digits."""
    archive = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-1000.tar"
    if archive.exists():
        with tarfile.open(archive) as tar:
            files = (tar.extractfile(one) for one in tar if one.isfile())
            return [one.read() for one, _ in zip(files, range(50), strict=False) if one]
    val = SplitImages(read_manifest(tiny_rec).splits["val"])
    return [val.image(place) for place in range(50)]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(lambda: run_command("export", main), [str(one) for one in arguments])


def pictures(jpegs: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(one)).convert("RGB") for one in jpegs]


def batch(trained: mpl_fast.Trained, jpegs: list[bytes]) -> Tensor:
    return torch.stack([trained.transform(one) for one in pictures(jpegs)])


@pytest.mark.parametrize(("name", "frozen"), [(RESNET, False), (RESNET, True), (VIT, False)])
def test_timm_loads_the_weights(
    name: str, frozen: bool, tiny_trained: Path, jpegs: list[bytes], tmp_path: Path
) -> None:
    timm: Any = importlib.import_module("timm")  # late: takes a second
    trained = with_network(mpl_fast.load(tiny_trained), name, frozen=frozen)
    assert frozen == any(isinstance(one, FrozenNorm) for one in trained.network.modules())
    file = tmp_path / "model.safetensors"
    assert export(trained, file).difference == 0
    images = batch(trained, jpegs)
    size = {"img_size": 32} if name == VIT else {}
    by_file = timm.create_model(name, num_classes=10, checkpoint_path=str(file), **size)
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for network in (by_file, by_folder):
        assert torch.equal(network.eval()(images), trained.logits(images))
    data = timm.data.resolve_model_data_config(by_folder)
    transform = timm.data.create_transform(**data)
    theirs = torch.stack([transform(one) for one in pictures(jpegs)])
    torch.testing.assert_close(theirs, images)
    assert by_folder.pretrained_cfg["label_names"] == [*trained.classes]


def test_own_networks_begin_with_the_weights(tiny_trained: Path, tmp_path: Path) -> None:
    trained, file = mpl_fast.load(tiny_trained), tmp_path / "model.safetensors"
    export(trained, file)
    again = models.build("wrn_10_1", 10, pretrained=str(file)).state_dict()
    assert again.keys() == trained.network.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in trained.network.state_dict().items())


def programs(folder: Path) -> dict[str, Any]:
    """Functions from images to logits, by suffix."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return {
        ".pt2": torch.export.load(folder / "model.pt2").module(),
        ".onnx": lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
    }


def test_a_folder_of_all_formats(tiny_trained: Path, jpegs: list[bytes], tmp_path: Path) -> None:
    """Its model card has Python for each, which runs where mpl_fast cannot be imported."""
    trained = with_network(mpl_fast.load(tiny_trained), RESNET)
    for suffix, form in FORMATS.items():
        difference = export(trained, tmp_path / f"model{suffix}").difference
        assert difference is not None and difference <= form.tolerance
    images = batch(trained, jpegs)
    expected = trained.logits(images)
    for suffix, run in programs(tmp_path).items():
        for several in (images, images[:1]):
            off = (run(several) - expected[: len(several)]).abs().max() / expected.abs().max()
            assert off <= FORMATS[suffix].tolerance
    (tmp_path / "image.jpg").write_bytes(jpegs[7])
    card = (tmp_path / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 3
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys; sys.modules['mpl_fast'] = None", *code])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    label = trained.classes[int(trained.predict(pictures(jpegs[7:8])).argmax())]
    assert done.stdout.split() == [label] * 3


@pytest.mark.parametrize("antialias", [True, False])
def test_the_images_of_a_card_are_those_of_evaluation(
    antialias: bool, jpegs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(image_size=64, interpolation="bilinear", antialias=antialias)
    (tmp_path / "image.jpg").write_bytes(jpegs[7])
    monkeypatch.chdir(tmp_path)
    found = dict[str, Any]()
    exec(_images(data), found)
    expected = transform_of(RunConfig(data=data))(pictures(jpegs[7:8])[0])
    off = (torch.from_numpy(found["images"][0]) - expected).abs() * 255 * min(data.std)
    assert off.mean() < 1 and off.max() < 2.1


def test_an_ensemble_is_one_program(tiny_trained: Path, tmp_path: Path) -> None:
    one = mpl_fast.load(tiny_trained)
    torch.manual_seed(0)
    members = [one.network, models.build("wrn_10_1", 10).eval()]
    both = dataclasses.replace(one, network=Ensemble(members, "probability"))
    export(both, tmp_path / "model.pt2")
    images = torch.randn(5, 3, 16, 16)
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found, both.logits(images))
    with pytest.raises(ConfigError, match=r"ensemble of 2 networks.* \.pt2 or \.onnx"):
        export(both, tmp_path / "other" / "model.safetensors")
    assert not list((tmp_path / "other").iterdir())


def test_a_file_with_other_logits_is_not_written(tiny_trained: Path, tmp_path: Path) -> None:
    trained = mpl_fast.load(tiny_trained)
    for module in trained.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.1  # which weights do not hold
    with pytest.raises(OutputError, match="not written: its logits of random images differ"):
        export(trained, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_card_is_of_the_run(tiny_trained: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    """Of a folder whose name has a space, too."""
    out = tmp_path / "of digits" / "model.safetensors"
    done = command(tiny_trained, "--out", out)
    assert done.stdout.endswith(f"hf upload USER/NAME '{out.parent}'\n")
    card = ModelCard.load(out.with_name("README.md"))
    top1 = json.loads((tiny_trained / "summary.json").read_text())["top1"]
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_value == pytest.approx(top1, abs=0.01)
    assert "20 labeled, 60 unlabeled, 50 val" in card.text
    assert str(tiny_trained.parent) not in card.content


def test_bad_input(tiny_trained: Path, tmp_path: Path) -> None:
    """One line, and what was there stays."""
    (tmp_path / "plain").write_text("text")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_bytes(b"{\xff}")
    (tmp_path / "taken.pt2").write_text("taken")
    for run, out, code, words in (
        (tiny_trained, "model.h5", 2, "must end in .safetensors, .pt2, .onnx"),
        (tiny_trained, "w.safetensors", 2, "found by the name model.safetensors only"),
        (tmp_path, "model.pt2", 4, "config.yaml does not exist: name a run directory"),
        (tiny_trained, "taken.pt2", 3, "exists: give another name, or --force"),
        (tiny_trained, "plain/model.safetensors", 3, "plain"),
        (tiny_trained, "theirs/model.safetensors", 3, "config.json is not of an export"),
    ):
        done = command(run, "--out", tmp_path / out)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert words in done.stderr
    assert (tmp_path / "taken.pt2").read_text() == "taken"
    assert [one.name for one in (tmp_path / "theirs").iterdir()] == ["config.json"]


def test_force_replaces_what_an_export_wrote(tiny_trained: Path, tmp_path: Path) -> None:
    trained, out, card = mpl_fast.load(tiny_trained), tmp_path / "model.safetensors", "README.md"
    export(trained, out)
    edited = (tmp_path / card).read_text().replace("# license: choose one", "license: mit")
    (tmp_path / card).write_text(edited)
    newer = dataclasses.replace(trained, classes=tuple("abcdefghij"))
    with pytest.raises(OutputError, match=r"config\.json is of another export"):
        export(newer, tmp_path / "v.pt2")
    out.unlink()
    notes = export(trained, out).notes
    assert notes == [f"{tmp_path / card} has been edited and stays as it is"]
    assert (tmp_path / card).read_text() == edited
    export(newer, out, force=True)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"][0] == "a"
    assert (tmp_path / card).read_text() != edited
    out.unlink()  # as if stopped before it
    assert not export(newer, out).notes
    (tmp_path / card).write_bytes(b"mine \xff")
    export(trained, out, force=True)
    assert (tmp_path / card).read_bytes() == b"mine \xff"
