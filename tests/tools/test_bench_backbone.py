"""The benchmark of networks: counts, which variants are rejected, rows; never a time."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import models
from tools.bench import backbone
from tools.bench.backbone import BASE, BEST, EVERYWHERE, Limits, Problem, Variant
from tools.bench.backbone_work import MinimalWork, minimal_work
from tools.bench.harness import Report
from tools.bench.results import Row, Spread

CPU = torch.device("cpu")


def problem(size: int = 32, batch: int = 4, network: nn.Module | None = None) -> Problem:
    network = network or models.build("wrn_10_1", 10)
    return Problem("wrn_10_1", network, size, batch, 1, CPU)


def limits(flops: float, moved: float, gpu: str | None = None) -> Limits:
    return Limits(flops / 2, flops, moved, gpu)


def new_report(tmp_path: Path) -> Report:
    options = argparse.Namespace(
        minutes=None, smoke=True, commit="none", out=tmp_path / "out.json", rounds=1, seed=0
    )
    return Report("backbone", options)


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
    assert work.bytes(2, batch=10) == pytest.approx(2 * work.values + 12 * 86 / 10)
    assert all(p.device.type == "cpu" and p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "gflops", "megabytes"),
    [
        ("resnet50", 224, 24.5, 308),
        ("resnet18", 224, 10.9, 68),
        ("wrn_28_2", 32, 1.3, 15),
        ("convlarge", 32, 4.6, 17),
    ],
)
def test_work_agrees_with_another_count(
    name: str, size: int, gflops: float, megabytes: float
) -> None:
    """Those were computed by hand, layer by layer; they count gradients by the image, too."""
    work = minimal_work(models.build(name, backbone.classes(name)), size)
    assert work.flops / 1e9 == pytest.approx(gflops, rel=0.06)
    moved = work.bytes(2, batch=10**9)
    assert moved is not None
    assert moved / 1e6 == pytest.approx(megabytes, rel=0.07)


def test_a_network_of_other_modules_has_no_count_of_bytes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4))
    work = minimal_work(network, 8)
    assert work.bytes(2, 4) is None
    assert work.flops == 2 * 2 * 4 * 3 * 64
    assert backbone.roof(work, 4, limits(2e9, 1.0), BEST) == 2e9 / work.flops
    names = [row.name for row in backbone.work_rows(problem(), work)]
    assert names == ["wrn_10_1, 4 x 32 px: arithmetic"]


@pytest.mark.parametrize(
    ("weights", "batch", "flops", "moved", "variant", "images"),
    [
        (0, 1, 1000.0, 1e9, BEST, 10.0),
        (0, 1, 1000.0, 1e9, BASE, 5.0),
        (0, 1, 1e9, 80.0, BEST, 4.0),
        (0, 1, 1e9, 80.0, BASE, 2.0),
        (40, 4, 1e9, 80.0, BEST, 80 / (20 + 120)),
    ],
)
def test_the_lower_roof_is_the_limit(
    weights: int, batch: int, flops: float, moved: float, variant: Variant, images: float
) -> None:
    work = MinimalWork(flops=100, values=10, weights=weights)
    assert backbone.roof(work, batch, limits(flops, moved), variant) == images


def test_rows_of_known_times() -> None:
    times = {BASE.name: [2.0, 4.0], BEST.name: [1.0, 1.0]}
    one = problem(batch=6)._replace(steps=2)
    work = MinimalWork(flops=10**12, values=None, weights=0)
    found = backbone.time_rows(one, BEST, times, work, limits(48e12, 1.0))
    name = "wrn_10_1, 6 x 32 px: compile NHWC bf16"
    assert found == [
        Row(name, Spread(12.0, 12.0, 12.0, 2), "img/s", "higher", limit=48.0),
        Row(f"{name}, step", Spread(500.0, 500.0, 500.0, 2), "ms"),
        Row(f"{name}, speed", Spread(12.0, 12.0, 12.0, 2), "TFLOP/s", "higher", limit=48.0),
        Row(f"{name} / {BASE.name}", Spread(3.0, 2.0, 4.0, 2), "times", "higher", steady=True),
    ]
    assert len(backbone.time_rows(one, BASE, times, work, limits(48e12, 1.0))) == 3


@pytest.mark.parametrize(
    ("gpu", "model", "size", "variant", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "resnet50", 224, BEST, 3000.0),
        ("NVIDIA H200", "resnet50", 224, BEST, 3000.0),
        ("NVIDIA A100", "resnet50", 224, BEST, None),
        (None, "resnet50", 224, BEST, None),
        ("NVIDIA H100 80GB HBM3", "resnet50", 192, BEST, None),
        ("NVIDIA H100 80GB HBM3", "resnet18", 224, BEST, None),
        ("NVIDIA H100 80GB HBM3", "resnet50", 224, BASE, None),
    ],
)
def test_the_target_is_for_an_h100(
    gpu: str | None, model: str, size: int, variant: Variant, target: float | None
) -> None:
    one = problem(size)._replace(model=model)
    assert backbone.target(one, variant, gpu) == target


def test_variants_of_a_device() -> None:
    on_gpu = [one.name for one in backbone.variants(torch.device("cuda"), tuned=True)]
    assert on_gpu[:5] == [one.name for one in EVERYWHERE]
    assert on_gpu[5:] == ["compile NHWC bf16, CUDA graph", "max-autotune NHWC bf16"]
    on_cpu = backbone.variants(CPU, tuned=False)
    assert len(on_cpu) == 5
    assert backbone.choose(on_cpu, "compile") == [BASE, EVERYWHERE[3], BEST]
    assert backbone.choose(on_cpu, "") == on_cpu


@pytest.mark.parametrize(
    ("variant", "channels_last", "dtype"),
    [(BASE, False, torch.float32), (EVERYWHERE[2], True, torch.bfloat16)],
)
def test_layout_and_precision_are_what_the_name_says(
    variant: Variant, channels_last: bool, dtype: torch.dtype
) -> None:
    one, seen = problem(), list[Tensor]()
    blocks: Any = one.network.blocks
    blocks.register_forward_hook(lambda module, inputs, out: seen.append(out))
    loss = backbone.prepared(variant, one.network, *one.images())()
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    assert seen[0].dtype == dtype
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert all(p.grad is not None and p.dtype == torch.float32 for p in one.network.parameters())


def test_a_step_begins_without_gradients() -> None:
    one = problem()
    step = backbone.prepared(BASE, one.network, *one.images())
    first = step(), [p.grad for p in one.network.parameters()]
    second = step(), [p.grad for p in one.network.parameters()]
    torch.testing.assert_close(first, second)


class Wrong(nn.Module):
    """Computes something else in bfloat16, and fails with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if images.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("no such layout")
        factor = 2.0 if torch.is_autocast_enabled("cpu") else 1.0
        logits: Tensor = self.head(images.flatten(1)) * factor
        return logits


def test_a_variant_that_is_wrong_or_fails_is_not_timed(tmp_path: Path) -> None:
    other = BASE._replace(name="other", bf16=True)
    report, one = new_report(tmp_path), problem(8, network=Wrong())
    steps = backbone.correct(one, [BASE, other, EVERYWHERE[1]], report)
    assert list(steps) == [BASE.name]
    label = "wrn_10_1, 4 x 8 px"
    assert list(report.failed) == [f"{label}: other", f"{label}: eager NHWC fp32"]
    assert "wrong: its" in report.failed[f"{label}: other"]
    assert report.failed[f"{label}: eager NHWC fp32"] == "ValueError: no such layout"


@pytest.mark.parametrize(
    ("mine", "word"),
    [
        ((1.0, 2.0), ""),
        ((1.04, 2.4), ""),
        ((1.06, 2.0), "its loss is 1.06"),
        ((1.0, 2.6), "its gradient norm is 2.6"),
        ((float("nan"), 2.0), "its loss is nan"),
    ],
)
def test_how_far_off_is_wrong(mine: tuple[float, float], word: str) -> None:
    found = backbone.difference((1.0, 2.0), mine)
    assert word in found
    assert bool(word) == bool(found)


def test_the_usual_sizes() -> None:
    small = backbone.problem("wrn_28_2", CPU)
    large = backbone.problem("resnet50", torch.device("cuda"))
    assert (small.image_size, small.batch, small.steps) == (32, 64, 1)
    assert (large.image_size, large.batch, large.steps) == (224, 256, 10)
    assert backbone.problem("resnet50", CPU, batch=3).label == "resnet50, 3 x 224 px"
    assert (backbone.classes("wrn_28_2"), backbone.classes("resnet50")) == (10, 1000)


def test_a_graph_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, replays, capturing = list[bool](), list[int](), False

    def captured(work: Callable[[], None]) -> SimpleNamespace:
        nonlocal capturing
        capturing = True
        work()
        capturing = False
        return SimpleNamespace(replay=lambda: replays.append(1))

    one = problem(8)
    one.network.register_forward_hook(lambda *_: passes.append(capturing))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(backbone, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    step = backbone.prepared(BASE._replace(graphed=True), one.network, *one.images())
    losses = [float(step()) for _ in range(2)]
    assert passes == [False] * backbone.GRAPH_WARMUP + [True]
    assert len(replays) == 2
    assert losses[0] == losses[1] > 0


def test_memory_of_a_step_includes_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network = problem().network
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def counted(step: Callable[[], Tensor]) -> int:
        assert all(p.grad is None for p in network.parameters())
        return int(step())

    monkeypatch.setattr(backbone, "extra_memory", counted)
    assert backbone.step_memory(lambda: torch.tensor(500), network) == 500


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--smoke", "--device", "cpu", "--only", "eager", "--out", str(out)]
    assert backbone.main(arguments) == 0
    found = json.loads(out.read_text())
    assert (found["bench"], found["failed"]) == ("backbone", {})
    products = {f"{dtype} product, FLOP/s" for dtype in ("fp32", "bf16")}
    assert set(found["limits"]) == {*products, "copy, bytes/s"}
    rows = {row["name"]: row for row in found["rows"]}
    label = "wrn_10_1, 4 x 32 px"
    for variant in EVERYWHERE:
        name = f"{label}: {variant.name}"
        assert (name in rows) == (not variant.compiled)
        assert variant.compiled or (rows[name]["median"] > 0 and rows[name]["limit"] > 0)
    assert f"| {label}: eager NHWC bf16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_variants_compute_the_same(tmp_path: Path) -> None:
    """In one graph each, or `fullgraph` would have failed."""
    report, compiled = new_report(tmp_path), [one for one in EVERYWHERE if one.compiled]
    steps = backbone.correct(problem(16), [BASE, *compiled], report)
    assert report.failed == {}
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--models", "wrn_10_1", "resnet5O"], "resnet5O"),
        (["--models", "wrn_10_1", "--only", "magic"], "--only 'magic' is in none of"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert backbone.main(["--out", str(tmp_path / "out.json"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.bench backbone: ")
    assert word in line
    assert not (tmp_path / "out.json").exists()


def test_a_batch_of_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        backbone.main(["--batch", "1"])
    assert "--batch: 1 is too small: give at least 2" in capsys.readouterr().err
