"""Steps beside the time that a dry run computes: ratios by hand, and the whole command."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mpl_fast.config.cards import Card
from mpl_fast.dry_run.roofline import BOUNDS
from tools.bench import roofline
from tools.bench.backbone import Problem, Variant

CPU = torch.device("cpu")


def test_the_limit_is_the_time_at_peak_rates_and_bounds_are_beside_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten())
    problem = Problem("x", network, 8, batch=10, device=CPU)
    card = Card("slow", bf16=1.0, tf32=1e3, memory=0.0, bandwidth=1e30, links=1.0)
    flops = 2 * 2 * 3 * 4 * 64 * 10  # forward, and backward for the weights alone
    seconds = flops / 1e3
    measured, low, high = roofline.rows(problem, Variant("eager fp32"), [3 * seconds], card)
    assert measured.name == "x, 10 x 8 px: eager fp32"
    assert measured.found.median == pytest.approx(3000 * seconds)
    assert measured.limit == pytest.approx(1000 * seconds)
    assert low.name.endswith("/ optimistic bound") and high.name.endswith("/ pessimistic bound")
    assert low.found.median == pytest.approx(3 * BOUNDS[0].compute)
    assert high.found.median == pytest.approx(3 * BOUNDS[1].compute)


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    given = ["--smoke", "--eager", "--device", "cpu", "--out", str(out)]
    assert roofline.main(given) == 0
    found = json.loads(out.read_text())
    assert (found["bench"], found["failed"]) == ("roofline", {})
    assert set(found["limits"]) == {"fp32 FLOP/s", "bf16 FLOP/s", "copy, bytes/s"}
    names = [row["name"] for row in found["rows"]]
    assert len(names) == 2 * 3 and not any("compile" in name for name in names)
    assert all(row["median"] > 0 for row in found["rows"])
    assert "| wrn_10_1, 4 x 32 px: eager bf16 |" in capsys.readouterr().out
