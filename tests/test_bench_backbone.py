"""The benchmark of the networks: what it counts, whom it calls wrong, its rows; never a time."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.errors import ConfigError
from tools import bench_backbone
from tools.bench.clock import Spread
from tools.bench_nets import contestants, measure, rows
from tools.bench_nets.contestants import BASE, BEST, EVERYWHERE, Contestant
from tools.bench_nets.setting import Setting, setting
from tools.bench_nets.work import Work, counted

CPU = torch.device("cpu")
ONE = Spread(1.0, 1.0, 1.0, 1)


def sized(model: str, size: int, batch: int = 4) -> Setting:
    return Setting(model, size, batch, steps=1, rounds=1, seed=0, device=CPU)


def limits(flops: float, moved: float, gpu: str | None = None) -> rows.Limits:
    half, copy = Spread(flops / 2, 0.0, flops / 2, 1), Spread(moved / 2, 0.0, moved, 2)
    return rows.Limits(half, Spread(flops / 2, 0.0, flops, 2), copy, gpu)


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
    work = counted(network, 8)
    image, first, second = 3 * 64, 2 * 64, 4 * 64
    stem, norm = 2 * (image + first), 8 * first
    head = 2 * (second + 4) + 3 * (4 + 5)
    assert work.values == stem + norm + 3 * (first + second) + head
    products = 2 * 64 * 3 * 2 * 9, 3 * 64 * 2 * 4, 3 * 4 * 5  # the image needs no gradient
    assert work.flops == 2 * sum(products)
    assert work.weights == 54 + 4 + 8 + 20
    moved = work.bytes(2, batch=10)
    assert moved == pytest.approx(2 * work.values + 12 * 86 / 10)
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
    work = counted(models.build(name, sized(name, size).classes), size)
    assert work.flops / 1e9 == pytest.approx(gflops, rel=0.06)
    moved = work.bytes(2, batch=10**9)
    assert moved is not None
    assert moved / 1e6 == pytest.approx(megabytes, rel=0.07)


def test_a_network_of_other_modules_has_no_count_of_bytes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4))
    work = counted(network, 8)
    assert work.bytes(2, 4) is None
    assert work.flops == 2 * 2 * 4 * 3 * 64
    assert rows.roof(work, 4, limits(2e9, 1.0), bf16=True) == 2e9 / work.flops


def test_the_lower_roof_is_the_limit() -> None:
    work = Work(flops=100, values=10, weights=0)
    assert rows.roof(work, 1, limits(1000.0, 1e9), bf16=True) == 10.0
    assert rows.roof(work, 1, limits(1000.0, 1e9), bf16=False) == 5.0
    assert rows.roof(work, 1, limits(1e9, 80.0), bf16=True) == 4.0
    assert rows.roof(work, 1, limits(1e9, 80.0), bf16=False) == 2.0
    heavy = Work(flops=100, values=10, weights=40)
    assert rows.roof(heavy, 4, limits(1e9, 80.0), bf16=True) == 80 / (20 + 120)


def test_rows_of_known_times() -> None:
    times = {BASE.name: [2.0, 4.0], BEST.name: [1.0, 1.0]}
    one = sized("wrn_28_2", 32, batch=6)._replace(steps=2)
    work = Work(flops=10**12, values=None, weights=0)
    found = rows.time_rows(one, BEST, times, work, limits(48e12, 1.0))
    name = "wrn_28_2, 6 x 32 px: compile NHWC bf16"
    assert [row.name for row in found] == [
        name,
        f"{name}, step",
        f"{name}, speed",
        f"{name} / {BASE.name}",
    ]
    rate, step, speed, gain = found
    assert (rate.found.median, rate.limit, rate.unit) == (12.0, 48.0, "img/s")
    assert step.found.median == 500.0
    assert (speed.found.median, speed.limit) == (12.0, 48.0)
    assert gain.found == Spread(3.0, 2.0, 4.0, 2)
    assert [row.steady for row in found] == [False, False, False, True]
    assert len(rows.time_rows(one, BASE, times, work, limits(48e12, 1.0))) == 3


@pytest.mark.parametrize(
    ("gpu", "model", "size", "who", "target"),
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
    gpu: str | None, model: str, size: int, who: Contestant, target: float | None
) -> None:
    assert rows.target(sized(model, size), who, gpu) == target


def test_who_competes() -> None:
    gpu = [one.name for one in contestants.contestants(torch.device("cuda"), tuned=True)]
    assert gpu[:5] == [one.name for one in EVERYWHERE]
    assert gpu[5:] == ["compile NHWC bf16, CUDA graph", "max-autotune NHWC bf16"]
    assert len(contestants.contestants(CPU, tuned=False)) == 5


def test_layout_and_precision_are_what_the_name_says() -> None:
    images, labels = sized("wrn_10_1", 32).images()
    for who, last, kind in ((BASE, False, torch.float32), (EVERYWHERE[2], True, torch.bfloat16)):
        network = models.build("wrn_10_1", 10)
        seen: list[Tensor] = []
        blocks: Any = network.blocks
        blocks.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        loss = contestants.prepared(who, network, images, labels)()
        assert loss.dtype == torch.float32
        assert not loss.requires_grad
        assert seen[0].dtype == kind
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == last
        assert all(p.grad is not None and p.dtype == torch.float32 for p in network.parameters())


def test_a_step_begins_without_gradients() -> None:
    images, labels = sized("wrn_10_1", 32).images()
    network = models.build("wrn_10_1", 10)
    step = contestants.prepared(BASE, network, images, labels)
    first = step(), [p.grad for p in network.parameters()]
    second = step(), [p.grad for p in network.parameters()]
    torch.testing.assert_close(first, second)


class Wrong(nn.Module):
    """A network that another contestant computes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 10)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if images.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("no such layout\nand more")
        factor = 2.0 if torch.is_autocast_enabled("cpu") else 1.0
        logits: Tensor = self.head(images.flatten(1)) * factor
        return logits


def test_who_is_wrong_or_fails_is_told_and_not_timed() -> None:
    other = BASE._replace(name="other", bf16=True)
    one = sized("wrn_10_1", 8)
    found = measure.measure(one, Wrong(), [BASE, other, EVERYWHERE[1]], limits(1.0, 1.0))
    label = "wrn_10_1, 4 x 8 px"
    assert list(found.failed) == [f"{label}: other", f"{label}: eager NHWC fp32"]
    assert "wrong: its" in found.failed[f"{label}: other"]
    assert found.failed[f"{label}: eager NHWC fp32"] == "ValueError: no such layout"
    timed = [row.name for row in found.rows if row.unit == "img/s"]
    assert timed == [f"{label}: {BASE.name}"]


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
    found = measure.difference((1.0, 2.0), mine)
    assert word in found
    assert bool(word) == bool(found)


def test_the_usual_sizes() -> None:
    asked = partial(setting, image_size=None, steps=None, rounds=1, seed=0)
    small = asked("wrn_28_2", CPU, batch=None)
    large = asked("resnet50", torch.device("cuda"), batch=None)
    assert (small.image_size, small.batch, small.steps, small.classes) == (32, 64, 1, 10)
    assert (large.image_size, large.batch, large.steps, large.classes) == (224, 256, 10, 1000)
    assert asked("resnet50", CPU, batch=3).label == "resnet50, 3 x 224 px"
    with pytest.raises(ConfigError, match="--batch 1 is too small: give at least 2"):
        asked("resnet50", CPU, batch=1)


class PretendedGraph:
    """Knows how often it was replayed."""

    replays = 0

    def replay(self) -> None:
        """Counts."""
        self.replays += 1


def test_a_graph_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []  # in the capture?
    graph, capturing = PretendedGraph(), False

    def captured(work: Callable[[], None]) -> PretendedGraph:
        nonlocal capturing
        capturing = True
        work()
        capturing = False
        return graph

    network = models.build("wrn_10_1", 10)
    network.register_forward_hook(lambda *_: passes.append(capturing))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(contestants, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graphed = BASE._replace(graphed=True)
    step = contestants.prepared(graphed, network, *sized("wrn_10_1", 8).images())
    losses = [float(step()) for _ in range(2)]
    assert passes == [False] * contestants.WARMUP + [True]
    assert graph.replays == 2
    assert losses[0] == losses[1] > 0


def test_peak_memory_is_a_step_without_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    network, peak = models.build("wrn_10_1", 10), [0]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> Tensor:
        assert all(p.grad is None for p in network.parameters())
        peak[0] = 700
        return torch.zeros(())

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.append(0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    assert contestants.peak_bytes(step, network) == 500
    assert len(peak) == 2


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--smoke", "--device", "cpu", "--only", "eager", "--out", str(out)]
    assert bench_backbone.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["bench"] == "bench_backbone"
    assert found["failed"] == {}
    assert set(found["limits"]) == {
        "fp32 product, TFLOP/s",
        "bf16 product, TFLOP/s",
        "copy, GB/s",
    }
    names = {row["name"]: row for row in found["rows"]}
    label = "wrn_10_1, 4 x 32 px"
    for who in ("eager NCHW fp32", "eager NHWC fp32", "eager NHWC bf16"):
        assert names[f"{label}: {who}"]["median"] > 0
        assert names[f"{label}: {who}"]["limit"] > 0
    assert f"{label}: compile NHWC bf16" not in names
    assert f"| {label}: eager NHWC bf16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_contestants_compute_the_same() -> None:
    """In one graph each, or `fullgraph` would have failed."""
    network = models.build("wrn_10_1", 10)
    compiled = [BASE, *(one for one in EVERYWHERE if one.compiled)]
    found = measure.measure(sized("wrn_10_1", 16), network, compiled, limits(1e9, 1e9))
    assert found.failed == {}
    assert sum(row.unit == "img/s" for row in found.rows) == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--models", "wrn_10_1", "resnet5O"], "resnet5O"),
        (["--models", "wrn_10_1", "--batch", "1"], "--batch 1"),
        (["--models", "wrn_10_1", "--rounds", "0"], "--rounds 0"),
        (["--models", "wrn_10_1", "--only", "magic"], "--only 'magic' is in none of"),
        (["--models", "wrn_10_1", "--out", "/proc/none/out.json"], "/proc/none"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench_backbone.main(["--out", str(tmp_path / "out.json"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_backbone: ")
    assert word in line
    assert not (tmp_path / "out.json").exists()
