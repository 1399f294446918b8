"""The benchmark of networks: counts, which variants are rejected, rows; never a time."""

import argparse
import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.config.cards import Card
from mpl_fast.dry_run.roofline import BOUNDS
from tools.bench import backbone
from tools.bench.backbone import (
    BASE,
    BEST,
    VARIANTS,
    Problem,
    Variant,
)
from tools.bench.harness import Report
from tools.bench.results import Row, Spread

CPU = torch.device("cpu")


def problem(size: int = 32, batch: int = 4, network: nn.Module | None = None) -> Problem:
    network = network or models.build("wrn_10_1", 10)
    return Problem("wrn_10_1", network, size, batch, CPU)


def one_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten())


FLOPS = 2 * 2 * 3 * 4 * 64  # of an image: forward, and backward for the weights alone


def test_rows_of_known_times() -> None:
    """On a card where arithmetic is the limit in bfloat16, and on one of slow memory."""
    times = {BASE.name: [2.0, 4.0], BEST.name: [1.0, 1.0]}
    one = problem(8, batch=12, network=one_convolution())
    card = Card("CPU", bf16=12 * FLOPS / 0.25, tf32=1e30, memory=0.0, bandwidth=1e30, links=1.0)
    rate, gain, low, high = backbone.time_rows(one, BEST, times, card)
    name = "wrn_10_1, 12 x 8 px: compile NHWC bf16"
    assert rate._replace(limit=None) == Row(name, Spread(12.0, 12.0, 12.0, 2), "img/s", "higher")
    assert rate.limit == pytest.approx(12 / 0.25)
    gained = Spread(3.0, 2.0, 4.0, 2)
    assert gain == Row(f"{name} / {BASE.name}", gained, "times", "higher", steady=True)
    assert [row.name for row in (low, high)] == [
        f"{name} / {word} bound" for word in ("optimistic", "pessimistic")
    ]
    for row, bound in zip((low, high), BOUNDS, strict=True):
        assert row.found.median == pytest.approx(bound.compute / 0.25)
    # Images twice, activations also when they are flattened, weights (48 bytes) three times.
    moved = 12 * 4 * 64 * (2 * 3 + 4 * 4) + 3 * 48
    slow = card._replace(bandwidth=moved / 0.5)
    found = backbone.time_rows(one, BASE, times, slow)
    assert len(found) == 3
    assert found[0].limit == pytest.approx(12 / 0.5)
    assert all(p.device.type == "cpu" and p.grad is None for p in one.network.parameters())


@pytest.mark.parametrize(
    ("gpu", "model", "variant", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "resnet50", BEST, 3000.0),
        ("NVIDIA A100", "resnet50", BEST, None),
        ("CPU", "resnet50", BEST, None),
        ("NVIDIA H200", "resnet18", BEST, None),
        ("NVIDIA H200", "resnet50", BASE, None),
    ],
)
def test_the_target_is_for_an_h100(
    gpu: str, model: str, variant: Variant, target: float | None
) -> None:
    one = problem(8, network=one_convolution())._replace(model=model)
    found = backbone.time_rows(one, variant, {variant.name: [1.0]}, Card(gpu, 1, 1, 1, 1, 1))
    assert found[0].target == target


@pytest.mark.parametrize(
    ("variant", "channels_last", "dtype"),
    [(BASE, False, torch.float32), (VARIANTS[2], True, torch.bfloat16)],
)
def test_layout_and_precision_are_what_the_name_says(
    variant: Variant, channels_last: bool, dtype: torch.dtype
) -> None:
    one, seen = problem(), list[Tensor]()
    blocks: Any = one.network.blocks
    blocks.register_forward_hook(lambda module, inputs, out: seen.append(out))
    step = backbone.prepared(variant, one.network, *one.images())
    loss, parameters = step(), list(one.network.parameters())
    first = copy.deepcopy([p.grad for p in parameters])
    step()  # begins without gradients
    torch.testing.assert_close([p.grad for p in parameters], first)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert seen[0].dtype == dtype
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert all(p.grad is not None and p.dtype == torch.float32 for p in parameters)


class Wrong(nn.Module):
    """Computes something else in bfloat16, and fails with channels last."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 10)
        self.factor, self.shift = factor, shift

    def forward(self, images: Tensor) -> Tensor:
        if images.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("no such layout")
        logits: Tensor = self.head(images.flatten(1))
        if torch.is_autocast_enabled("cpu"):
            # The forward pass is the same, or the backward pass.
            logits = self.factor * logits + (1.0 - self.factor) * logits.detach()
            logits = logits + self.shift * torch.arange(10)
        return logits


@pytest.mark.parametrize(
    ("factor", "shift", "words"),
    [
        (1.2, 0.0, ""),
        (1.3, 0.0, "its gradient norm is wrong"),
        (1.0, 0.5, "its loss is wrong"),
        (math.nan, 0.0, "its loss is wrong"),
    ],
)
def test_a_variant_that_is_wrong_or_fails_is_not_timed(
    factor: float, shift: float, words: str, tmp_path: Path
) -> None:
    other = BASE._replace(name="other", bf16=True)
    options = argparse.Namespace(minutes=None, out=tmp_path)
    report, one = Report("backbone", options), problem(8, network=Wrong(factor, shift))
    steps = backbone.correct(one, [BASE, other, VARIANTS[1]], report)
    assert list(steps) == [BASE.name, *([] if words else ["other"])]
    label = "wrn_10_1, 4 x 8 px"
    failed = report.failed
    assert failed.pop(f"{label}: eager NHWC fp32") == "ValueError: no such layout"
    assert list(failed) == ([f"{label}: other"] if words else [])
    assert words in "".join(failed.values())


@pytest.mark.slow
def test_smoke_measures_every_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled ones in one graph each, or `fullgraph` would have failed."""
    # The graphs alone: code for them takes minutes.
    traced = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    out = tmp_path / "out.json"
    assert backbone.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["bench"], found["failed"]) == ("backbone", {})
    rows = {row["name"]: row for row in found["rows"]}
    label = "wrn_10_1, 4 x 32 px"
    for variant in VARIANTS:
        row = rows[f"{label}: {variant.name}"]
        assert row["median"] > 0 and row["limit"] > 0
    assert f"| {label}: eager NHWC bf16 |" in capsys.readouterr().out


def test_a_wrong_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert backbone.main(["--out", str(out), "--models", "wrn_10_1", "resnet5O"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.bench backbone: error: ") and "resnet5O" in line
    assert not out.exists()
