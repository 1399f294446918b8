"""The benchmark of checkpoints uses real ones; no time is looked at."""

import json
from pathlib import Path

import pytest
import torch

from tools.bench import checkpoint
from tools.bench.checkpoint import Disk, new_algorithm


def test_smoke_measures_every_part(tmp_path: Path) -> None:
    out, folder = tmp_path / "deep" / "checkpoint.json", tmp_path / "disk"
    assert checkpoint.main(["--smoke", "--out", str(out), "--folder", str(folder)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    parts = ["save", "verify", "plain write", "plain hash", "plain copy"]
    saves = ["a save stops training", "a save in the foreground", "a save in the background, whole"]
    assert list(rows) == ["a checkpoint", *saves, "verify, load and restore", *parts]
    assert all(row["n"] == 1 and row["median"] > 0 for row in rows.values())
    # Two networks, an average and two momenta of 77,850 float32 values and 64 x 990 more weights.
    values = 77_850 + 990 * 65
    assert rows["a checkpoint"]["median"] == pytest.approx(5 * 4 * values / 1e6, rel=0.15)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_save_beside_async_save(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    given = ["--smoke", "--out", str(out), "--folder", str(tmp_path / "disk"), "--ranks", "2"]
    assert checkpoint.main(given) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    ways = ["ours", "async_save", "async_save, memory kept", "async_save, a process"]
    for way in ways:
        stops, whole = (rows.pop(f"2 ranks, {way}: {what}") for what in ("stops training", "whole"))
        assert 0 < stops["median"] < whole["median"]
    assert not any("ranks" in name for name in rows)


def test_rows_of_known_times() -> None:
    seconds = {"save": [0.4, 0.5, 0.8], "verify": [0.2], "resume": [0.3]}
    seconds |= {"background": [0.05, 0.06, 0.07], "whole_background": [0.6]}
    seconds |= {"plain_copy": [0.04], "plain_write": [0.2], "plain_hash": [0.1]}
    rows = {row.name: row for row in checkpoint.rows(seconds, 10**8)}
    stop, save = rows["a save stops training"], rows["save"]
    assert (stop.found.median, stop.limit, stop.target) == (60.0, 40.0, 50.0)
    before = rows["a save in the foreground"]
    assert (before.found.median, before.limit, before.target) == (500.0, 200.0, None)
    assert rows["a save in the background, whole"].found.median == 600.0
    assert (save.found.median, save.limit, save.better) == (200.0, 500.0, "higher")
    assert (rows["verify"].found.median, rows["verify"].limit) == (500.0, 1000.0)
    assert rows["a checkpoint"].found.median == 100.0 and rows["a checkpoint"].steady
    assert rows["verify, load and restore"].found.median == 300.0


def test_what_is_timed_is_a_real_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    algorithm = new_algorithm("wrn_10_1", torch.device("cpu"))
    disk = Disk(algorithm, tmp_path)
    files = {f.name: f.stat().st_size for f in (tmp_path / "checkpoints").rglob("*.pt")}
    assert disk.content.nbytes == sum(files.values()) == (tmp_path / "plain").stat().st_size
    weight = next(iter(algorithm.learners["student"].network.parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(7.0)
    disk.resume()
    assert torch.equal(weight, before)
    disk.save()
    disk.whole_background()
    assert disk.seconds_of(disk.background) > 0  # and waits for it
    steps = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step_00000003", "step_00000004"]
    disk.verify()
    state = tmp_path / "checkpoints" / steps[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"\1")
    with pytest.raises(AssertionError, match="is not"):
        disk.verify()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ["--smoke", "--out", str(tmp_path / "x.json"), "--folder", str(tmp_path / "file")]
    assert checkpoint.main(given) == 2
    assert "file" in capsys.readouterr().err
