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
from tools.bench import backbone
from tools.bench.backbone import (
    BASE,
    BEST,
    VARIANTS,
    Limits,
    MinimalWork,
    Problem,
    Variant,
    minimal_work,
)
from tools.bench.harness import Report
from tools.bench.results import Row, Spread

CPU = torch.device("cpu")


def problem(size: int = 32, batch: int = 4, network: nn.Module | None = None) -> Problem:
    network = network or models.build("wrn_10_1", 10)
    return Problem("wrn_10_1", network, size, batch, CPU)


def limits(flops: float, moved: float) -> Limits:
    return Limits({False: flops / 2, True: flops}, moved)


def test_work_of_a_network_by_hand() -> None:
    """Stem 3 -> 2 of 3 x 3, norm, convolution 2 -> 4 of 1 x 1, pooling, linear 4 -> 5; 8 pixels."""
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 4, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
    )
    work = minimal_work(network, 8)
    image, first, second = 3 * 64, 2 * 64, 4 * 64
    stem, norm = 2 * (image + first), 8 * first
    head = 2 * (second + 4) + 3 * (4 + 5)
    assert work.values == stem + norm + 3 * (first + second) + head
    products = 2 * 64 * 3 * 2 * 9, 3 * 64 * 2 * 4, 3 * 4 * 5  # the image needs no gradient
    assert work.flops == 2 * sum(products)
    assert work.weights == 54 + 4 + 8 + 20
    memory = work.roof(BEST, 10, limits(1e12, 1.0))
    assert 1 / memory == pytest.approx(2 * work.values + 12 * 86 / 10)
    assert all(p.device.type == "cpu" and p.grad is None for p in network.parameters())


def test_work_agrees_with_another_count() -> None:
    """That was computed by hand, layer by layer; it counts gradients by the image, too."""
    work = minimal_work(models.build("resnet50", 1000), 224)
    assert work.flops / 1e9 == pytest.approx(24.5, rel=0.06)
    memory = work.roof(BEST, 10**9, limits(1e20, 1.0))
    assert 1 / memory / 1e6 == pytest.approx(308, rel=0.07)


def test_a_network_of_other_modules_has_no_count_of_bytes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4))
    work = minimal_work(network, 8)
    assert work.flops == 2 * 2 * 4 * 3 * 64
    assert work.roof(BEST, 4, limits(2e9, 1.0)) == 2e9 / work.flops


@pytest.mark.parametrize(
    ("weights", "batch", "flops", "moved", "variant", "images"),
    [
        (0, 1, 1000.0, 1e9, BEST, 10.0),
        (0, 1, 1000.0, 1e9, BASE, 5.0),
        (0, 1, 1e9, 80.0, BEST, 4.0),
        (40, 4, 1e9, 80.0, BEST, 80 / (20 + 120)),
    ],
)
def test_the_lower_roof_is_the_limit(
    weights: int, batch: int, flops: float, moved: float, variant: Variant, images: float
) -> None:
    work = MinimalWork(flops=100, values=10, weights=weights)
    assert work.roof(variant, batch, limits(flops, moved)) == images


def test_rows_of_known_times() -> None:
    times = {BASE.name: [2.0, 4.0], BEST.name: [1.0, 1.0]}
    one = problem(batch=12)
    work = MinimalWork(flops=10**12, values=None, weights=0)
    found = backbone.time_rows(one, BEST, times, work, limits(48e12, 1.0))
    name = "wrn_10_1, 12 x 32 px: compile NHWC bf16"
    assert found == [
        Row(name, Spread(12.0, 12.0, 12.0, 2), "img/s", "higher", limit=48.0),
        Row(f"{name} / {BASE.name}", Spread(3.0, 2.0, 4.0, 2), "times", "higher", steady=True),
    ]
    assert len(backbone.time_rows(one, BASE, times, work, limits(48e12, 1.0))) == 1


@pytest.mark.parametrize(
    ("gpu", "model", "variant", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "resnet50", BEST, 3000.0),
        ("NVIDIA A100", "resnet50", BEST, None),
        ("", "resnet50", BEST, None),
        ("NVIDIA H200", "resnet18", BEST, None),
        ("NVIDIA H200", "resnet50", BASE, None),
    ],
)
def test_the_target_is_for_an_h100(
    gpu: str, model: str, variant: Variant, target: float | None
) -> None:
    times, work = {variant.name: [1.0]}, MinimalWork(1, None, 0)
    one, machine = problem()._replace(model=model), limits(1.0, 1.0)._replace(gpu=gpu)
    (row,) = backbone.time_rows(one, variant, times, work, machine)
    assert row.target == target


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
    products = {f"{dtype} product, FLOP/s" for dtype in ("fp32", "bf16")}
    assert set(found["limits"]) == {*products, "copy, bytes/s"}
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
