"""The benchmark of several ranks: what it makes of times, and that the ranks run."""

import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mpl_fast.distributed import world_size
from tools.bench import ranks
from tools.bench.ranks import ALONE, TOGETHER
from tools.bench.step_variants import Setting

CPU = Setting("wrn_10_1", 2, 2, 8, torch.device("cpu"))  # 6 distinct images a rank


def by_name(found: Any, setting: Setting = CPU) -> dict[str, Any]:
    return {row.name: row for row in ranks.rows(found, setting, False)}


def test_rates_efficiency_and_the_share_of_the_exchange() -> None:
    one = {TOGETHER: [0.1, 0.1, 0.3], ALONE: [0.1, 0.1, 0.3]}
    four = {TOGETHER: [0.2, 0.25, 0.125], ALONE: [0.15, 0.125, 0.125]}
    made = by_name({4: four, 1: one})
    assert made["1 rank: step"].found.median == pytest.approx(100.0)
    assert made["1 rank: distinct images"].found.median == pytest.approx(60.0)
    assert made["4 ranks: distinct images"].found.median == pytest.approx(120.0)
    assert made["4 ranks: efficiency"].found.median == pytest.approx(0.5)
    share = made["4 ranks: share of the exchange"].found
    assert tuple(share[:3]) == pytest.approx((0.25, 0.0, 0.5))
    assert "1 rank: efficiency" not in made and "1 rank: share of the exchange" not in made
    assert made["4 ranks: efficiency"].target is None
    on_gpus = by_name({1: one, 4: four}, CPU._replace(device=torch.device("cuda")))
    assert on_gpus["4 ranks: efficiency"].target == 0.95
    assert "4 ranks: efficiency" not in by_name({4: four})  # of one rank nothing is known


def test_ranks_double_up_to_all() -> None:
    counts = [ranks.doubled(have) for have in (1, 2, 6, 8)]
    assert counts == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_without_exchange_a_rank_has_no_others() -> None:
    seen = []

    def make(setting: Setting) -> Any:
        seen.append(world_size())
        return lambda: seen.append(world_size())

    with (
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_world_size", return_value=2),
    ):
        ranks.without_exchange(make, CPU)()
        assert world_size() == 2
    assert seen == [1, 1]


@pytest.mark.slow
def test_smoke_runs_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert ranks.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    names = ["step", "distinct images", "share of the exchange"]
    assert [row["name"] for row in found["rows"]] == [f"2 ranks: {name}" for name in names]
    assert [row["n"] for row in found["rows"]] == [2, 2, 2]
    assert found["skipped"] == []


def test_ranks_that_fail_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def torchrun(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "--nproc-per-node=1" not in command:
            return subprocess.CompletedProcess(command, 1, "", "no port")
        times = [0.1] * int(command[-1])
        Path(command[7]).write_text(json.dumps({TOGETHER: times, ALONE: times}))
        return subprocess.CompletedProcess(command, 0)

    out = tmp_path / "out.json"
    options = [
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--steps",
        "3",
        "--out",
        str(out),
        "--commit",
        "x",
    ]
    with mock.patch.object(subprocess, "run", torchrun):
        assert ranks.main([*options, "--ranks", "1", "2"]) == 0
        found = json.loads(out.read_text())
        assert ranks.main([*options, "--ranks", "2"]) == 1
    assert found["skipped"] == ["2 ranks failed:\nno port"] * 2
    assert found["rows"][0]["n"] == 6
    assert "left out: 2 ranks failed" in capsys.readouterr().out


def test_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ranks.main(["--ranks", "0"])
    assert "--ranks: 0 is too small: give at least 1" in capsys.readouterr().err
