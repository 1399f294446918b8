"""The benchmark of checkpoints handles real ones; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpl_fast import algorithms, models
from mpl_fast.config import MPLConfig
from mpl_fast.learner import Learner
from tests.tiny_run import ROOT
from tools import bench_ckpt
from tools.bench_starts.saving import Saving


def test_smoke_measures_every_part(tmp_path: Path) -> None:
    out, folder = tmp_path / "deep" / "ckpt.json", tmp_path / "disk"
    command = [sys.executable, ROOT / "tools" / "bench_ckpt.py", "--smoke", "--out", out]
    done = subprocess.run(
        [str(part) for part in (*command, "--folder", folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert (told["form"], told["bench"]) == ("mpl_fast.bench/1", "bench_ckpt")
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [
        "a checkpoint",
        "a save stops training",
        "save",
        "verify",
        "load",
        "verify, load and restore",
        "plain write",
        "plain read",
        "plain hash",
    ]
    assert all(row["n"] == 1 and row["median"] > 0 for row in rows.values())
    assert rows["a save stops training"]["limit"] > 0
    assert rows["verify"]["limit"] == rows["plain hash"]["median"]
    # Two networks, an average and two momenta of 77,850 float32 values.
    assert rows["a checkpoint"]["median"] == pytest.approx(5 * 4 * 77_850 / 1e6, rel=0.15)
    assert list(folder.iterdir()) == []


def test_what_is_timed_is_a_real_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    algorithm = algorithms.build(
        MPLConfig(), lambda given: Learner(models.build("wrn_10_1", 2), given, steps=1)
    )
    saving = Saving(algorithm, tmp_path)
    files = {f.name: f.stat().st_size for f in (tmp_path / "checkpoints").rglob("*.pt")}
    assert saving.bytes == sum(files.values()) == (tmp_path / "plain").stat().st_size
    weight = next(iter(algorithm.learners["student"].network.parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(7.0)
    saving.resume()
    assert torch.equal(weight, before)
    for _ in range(3):
        saving.save()
    steps = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step_00000003", "step_00000004"]
    state = tmp_path / "checkpoints" / steps[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"\1")
    with pytest.raises(AssertionError, match="is not"):
        saving.verify()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ["--smoke", "--out", str(tmp_path / "x.json"), "--folder", str(tmp_path / "file")]
    assert bench_ckpt.main(given) == 2
    assert "file" in capsys.readouterr().err
