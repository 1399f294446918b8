"""The benchmark of the input delivers right views and right ratios; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Manifest
from tests.data.numbered_images import CLASSES, EACH, PLAIN, level, pack_numbered
from tools import bench_data
from tools.bench.form import FORM
from tools.bench_input import report, theirs
from tools.bench_input.clock import Round
from tools.bench_input.contestants import Contestant, Setting, all_contestants, swept
from tools.bench_input.records import Records
from tools.bench_input.report import PEER

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_numbered(tmp_path_factory.mktemp("numbered"))


def test_smoke_measures_every_contestant_once(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_data.py", "--smoke", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "no number here is a claim" in result["claim"]
    rates = {row["name"] for row in result["rows"] if row["unit"] == "img/s"}
    assert {name for name in rates if "spdl" not in name} == {
        *(f"{task}: torchvision-{kind}" for task in ("weak", "both") for kind in ("pil", "tensor")),
        "decode: dali",
        "weak: dali",
        *(
            f"{task}: dali-{policy}"
            for task in ("strong", "both")
            for policy in ("mpl", "mpl_branched", "dali")
        ),
    }
    assert all(row["n"] == 1 and row["median"] > 0 for row in result["rows"])
    assert result["form"] == FORM and result["machine"]["versions"]["nvidia-dali-cuda120"]
    assert "| both: dali-mpl against torchvision-pil |" in done.stdout


def test_the_sweep_is_of_our_settings(manifest: Manifest) -> None:
    """One at a time: the share of the JPEG engine at the present number of batches ahead."""
    split = manifest.splits["unlabeled"]
    setting = Setting(DataConfig(image_size=16), split, 8, 2, torch.device("cpu"))
    names = [one.name for one in swept(setting)]
    assert names == [f"threads {t} prefetch {p}" for t in (1, 2, 4) for p in (1, 2, 3, 4)]
    on_gpu = [one.name for one in swept(setting._replace(device=torch.device("cuda")))]
    assert len(on_gpu) == 3 * (3 + 7)
    assert "threads 2 prefetch 2 engine 0.12" in on_gpu
    views = next(swept(setting)[0].open())
    assert [view.shape for view in views[:2]] == [(8, 3, 16, 16)] * 2


@pytest.mark.skipif(not theirs.has_spdl(), reason="SPDL is an optional peer")
def test_spdl_delivers_the_same_views(manifest: Manifest) -> None:
    data = theirs.Views(PLAIN, manifest.splits["unlabeled"], "tensor", strong=True)
    batches = theirs.threads(data, 8, 2)
    weak, strong, labels = next(batches)
    assert weak.shape == strong.shape == (8, 3, 16, 16) and labels.shape == (8,)
    assert weak.dtype == torch.float32 and not torch.equal(weak, next(batches)[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--rec names a folder"),
        (["--rec", "/nowhere"], "nowhere"),
        pytest.param(
            ["--device", "gpu", "--smoke"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_data.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_peers_read_the_same_records(manifest: Manifest) -> None:
    """All 50 images with their labels, out of three shards."""
    split = manifest.splits["unlabeled"]
    records = Records(split)
    assert len(records) == split.records
    data = theirs.Views(PLAIN, split, "pil", strong=False)
    found = set()
    for number in range(len(records)):
        content, label = records[number]
        image = np.asarray(data._decode(content))
        found.add(int(image[0, 0, 0]))
        assert manifest.classes[label] == f"class{(image[0, 0, 0] - 2) // 4 % CLASSES}"
    assert found == {level(number) for number in range(CLASSES * EACH)}


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_a_peers_views_share_their_crop(manifest: Manifest, kind: theirs.Kind) -> None:
    torch.manual_seed(0)
    data = theirs.Views(PLAIN, manifest.splits["unlabeled"], kind, strong=True)
    pairs = [data[number % len(data)][:2] for number in range(200)]
    same = [
        torch.equal(weak, strong) or torch.equal(weak, strong.flip(2)) for weak, strong in pairs
    ]
    assert 1 < sum(same) < 150  # identity is one of the operations, and some leave these alone
    assert all(weak.shape == (3, 16, 16) for weak, _ in pairs)


def test_contestants_of_ours_use_their_policy(manifest: Manifest) -> None:
    """Strong views differ from weak ones, and so do those of two policies; the flip is off."""
    config = DataConfig(image_size=16, flip=False, translate=4, cutout=4)
    split = manifest.splits["unlabeled"]
    setting = Setting(config, split, 8, 1, torch.device("cpu"))
    first = {
        (one.task, one.name): next(one.open())
        for one in all_contestants(setting)
        if not one.peer and one.task != "decode"
    }
    assert {views[0].shape for views in first.values()} == {(8, 3, 16, 16)}
    weak, strong, _ = first["both", "dali-mpl"]
    assert not torch.equal(weak, strong)
    assert not torch.equal(strong, first["both", "dali-dali"][1])


def test_ratios_are_of_rounds() -> None:
    def contestant(name: str, peer: bool) -> Contestant:
        return Contestant(name, "both", lambda: iter(()), 1, peer)

    found = {
        ("both", PEER): [Round(100, 40), Round(200, 30), Round(100, 60)],
        ("both", "dali-mpl"): [Round(150, 20), Round(400, 20), Round(100, 20)],
    }
    made = report.rows([contestant(PEER, True), contestant("dali-mpl", False)], found)
    assert [row.name for row in made[:2]] == [f"both: {PEER}", f"both: {PEER}, CPU"]
    speed, saved = made[4:]
    assert speed.name == f"both: dali-mpl against {PEER}" and speed.target == 1.3 and speed.steady
    assert speed.found == (1.5, 1.0, 2.0, 3)
    assert saved.found == (2.0, 1.5, 3.0, 3)
