"""The benchmark of the input delivers right views and right ratios; no time is looked at."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Manifest
from mpl_fast.data.pipelines import Engine
from tests.data.numbered_images import CLASSES, EACH, PLAIN, level, pack_numbered
from tests.tiny_run import ROOT
from tools.bench import input as bench_input
from tools.bench import input_peers
from tools.bench.input import Round, Setting, Variant
from tools.bench.results import Row, Spread

CPU = torch.device("cpu")
PEER = "torchvision-pil"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.mark.slow
def test_smoke_measures_every_variant_once(tmp_path: Path) -> None:
    """In a process of its own: a DataLoader forks, which should happen before DALI has threads."""
    out = tmp_path / "deep" / "input.json"
    command = [sys.executable, "-m", "tools.bench", "input", "--smoke", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rates = {row["name"] for row in result["rows"] if row["unit"] == "img/s"}
    assert {name for name in rates if "spdl" not in name} == {
        *(f"{task}: torchvision-{kind}" for task in ("weak", "both") for kind in ("pil", "tensor")),
        "decode: dali",
        "decode and crop: dali",
        "resize: dali",
        "weak: dali",
        *(f"both: dali-{policy}" for policy in ("mpl", "mpl_branched", "dali")),
        "both: dali-mpl, own crops",
    }
    assert all(row["n"] == 1 and row["median"] > 0 for row in result["rows"])
    assert not any(row["target"] for row in result["rows"])
    assert result["records"] == 24
    assert "| both: dali-mpl against torchvision-pil |" in done.stdout


def test_the_sweep_is_of_our_settings(manifest: Manifest) -> None:
    """One at a time: the share of the JPEG engine at the present number of batches ahead."""
    split = manifest.splits["unlabeled"]
    setting = Setting(DataConfig(image_size=16), split, 8, 2, CPU)
    names = [one.name for one in bench_input.swept(setting)]
    assert names == [
        "both: threads 2 prefetch 2 pinned",
        *(f"both: threads {t} prefetch {p}" for t in (1, 2, 4) for p in (1, 2, 3, 4)),
    ]
    on_gpu = bench_input.swept(setting._replace(device=torch.device("cuda")))
    assert len(on_gpu) == 1 + 3 * (3 + 7)
    assert "both: threads 2 prefetch 2 engine 0.12" in [one.name for one in on_gpu]


@pytest.mark.parametrize(
    ("device", "half", "dtype"), [("cpu", False, torch.float32), ("cuda", True, torch.bfloat16)]
)
def test_dali_makes_what_training_takes(
    device: str, half: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(build: Callable[[], Engine], _: object, __: object, dtype: torch.dtype) -> Any:
        return build().half, dtype

    monkeypatch.setattr(bench_input, "train_pipeline", lambda _, __, engine, strong: engine)
    monkeypatch.setattr(bench_input, "Stream", stream)
    split: Any = None
    setting = Setting(DataConfig(image_size=16), split, 8, 2, torch.device(device))
    opened: object = bench_input.streamed("dali", "both", setting).open()
    assert opened == (half, dtype)


@pytest.mark.skipif(not input_peers.has_spdl(), reason="SPDL is an optional peer")
def test_spdl_delivers_the_same_views(manifest: Manifest) -> None:
    data = input_peers.Views(PLAIN, manifest.splits["unlabeled"], "tensor", strong=True)
    batches = input_peers.threads(data, 8, 2)
    weak, strong, labels = next(batches)
    assert weak.shape == strong.shape == (8, 3, 16, 16) and labels.shape == (8,)
    assert weak.dtype == torch.float32 and not torch.equal(weak, next(batches)[0])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--rec names a folder"),
        (["--rec", "/nowhere"], "nowhere"),
        pytest.param(
            ["--device", "cuda", "--smoke"],
            "finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_input.main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert error in capsys.readouterr().err


def test_peers_read_the_same_records(manifest: Manifest) -> None:
    """All 50 images with their labels, out of three shards."""
    split = manifest.splits["unlabeled"]
    records = input_peers.Records(split)
    assert len(records) == split.records
    data = input_peers.Views(PLAIN, split, "pil", strong=False)
    found = set()
    for number in range(len(records)):
        content, label = records[number]
        image = np.asarray(data.decode(content))
        found.add(int(image[0, 0, 0]))
        assert manifest.classes[label] == f"class{(image[0, 0, 0] - 2) // 4 % CLASSES}"
    assert found == {level(number) for number in range(CLASSES * EACH)}


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_a_peers_views_share_their_crop(manifest: Manifest, kind: input_peers.Kind) -> None:
    torch.manual_seed(0)
    data = input_peers.Views(PLAIN, manifest.splits["unlabeled"], kind, strong=True)
    pairs = [data[number % len(data)][:2] for number in range(200)]
    same = [
        torch.equal(weak, strong) or torch.equal(weak, strong.flip(2)) for weak, strong in pairs
    ]
    assert 1 < sum(same) < 150  # identity is one of the operations, and some leave these alone
    assert all(weak.shape == (3, 16, 16) for weak, _ in pairs)


@pytest.mark.slow
def test_variants_of_ours_use_their_policy(manifest: Manifest) -> None:
    """Strong views differ from weak ones, and so do those of two policies; the flip is off."""
    config = DataConfig(image_size=16, flip=False, translate=4, cutout=4)
    setting = Setting(config, manifest.splits["unlabeled"], 8, 1, CPU)
    decode, *_, mpl, _, dali = (one.open for one in bench_input.ours(setting))
    assert next(decode())[0].shape == (8, 3, 1, 1)
    weak, strong, _ = next(mpl())
    assert weak.shape == strong.shape == (8, 3, 16, 16)
    assert not torch.equal(weak, strong)
    assert not torch.equal(strong, next(dali())[1])


@pytest.mark.parametrize(
    ("task", "views", "wrong"),
    [("both", 3, ""), ("weak", 2, ""), ("both", 2, "for 3 tensors"), ("weak", 3, "for 2 tensors")],
)
def test_views_of_another_number_or_size_are_wrong(
    task: bench_input.Task, views: int, wrong: str
) -> None:
    variant = Variant("x", task, lambda: iter(()), 1, False)
    found = bench_input.difference(variant, [torch.zeros(4)] * views, 4)
    assert wrong in found and bool(wrong) == bool(found)
    assert bench_input.difference(variant, [torch.zeros(4)] * views, 5)


def test_ratios_are_of_rounds() -> None:
    def variant(maker: str, peer: bool) -> Variant:
        return Variant(maker, "both", lambda: iter(()), 1, peer)

    found = {
        f"both: {PEER}": [Round(100, 40), Round(200, 30), Round(100, 60)],
        "both: dali-mpl": [Round(150, 20), Round(400, 20), Round(100, 20)],
    }
    found["decode and crop: dali"] = [Round(200, 10), Round(600, 10), Round(400, 10)]
    decode = Variant("dali", bench_input.LIMIT, lambda: iter(()), 1, False)
    both = [decode, variant(PEER, True), variant("dali-mpl", False), variant("was wrong", False)]
    made = bench_input.rows(both, found)
    assert [row.name for row in made[2:4]] == [f"both: {PEER}", f"both: {PEER}, CPU"]
    assert [row.limit for row in made if row.unit == "img/s"] == [None, None, 400]
    (speed,) = made[6:]
    spread = Spread(1.5, 1.0, 2.0, 3)
    name = f"both: dali-mpl against {PEER}"
    assert speed == Row(name, spread, "x", "higher", steady=True, target=1.3)
    (smoke,) = bench_input.rows(both, found, smoke=True)[6:]
    assert smoke == Row(name, spread, "x", "higher")
