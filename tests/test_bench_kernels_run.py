"""The benchmark of the losses from end to end, with a pretended GPU: who is wrong, what is left."""

import json
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.kernels import reference
from mpl_fast.losses import CEOut, StudentOut
from tools import bench_kernels
from tools.bench_losses import capture, cells, contestants, correctness, others, progress
from tools.bench_losses.problems import LOSSES, Inputs, Shape, draw

SMALL = Shape("teacher", 10, 12, 16, torch.float32)
STEPS = ("step_ms_reference", "step_ms_triton")
MEASURED = ("eager, plain", "eager, definition", "torch.compile", "ours one-pass", "ours recompute")


def broken(fault: str) -> contestants.Call:
    """Our definition with one thing wrong."""
    sound = contestants.definition(SMALL)

    def call(x: Inputs) -> contestants.Done:
        out, gradient = sound(x)
        assert gradient is not None
        if fault == "gradient":
            gradient[3, 2] += 1e-3
        if fault == "unwritten":
            gradient[-1, -1] = torch.nan
        if fault == "statistic":
            out = out._replace(entropy=out.entropy * (1 + 1e-4))
        if fault == "label":
            out = out._replace(label=out.label.roll(1))
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return contestants.Done(out, gradient)

    return call


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("none", ""),
        ("gradient", "the gradient is off"),
        ("unwritten", "the gradient is off"),
        ("statistic", "entropy is off"),
        ("label", "label differs"),
        ("raises", "no such kernel"),
    ],
)
def test_who_is_wrong_is_told(fault: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = broken(fault)
    monkeypatch.setattr(contestants, "build", lambda name, shape: call)
    monkeypatch.setattr(correctness, "LOSSES", ["teacher"])
    monkeypatch.setattr(correctness, "BATCH", SMALL.batch)
    shapes = [(SMALL.classes, SMALL.width, SMALL.dtype)]
    (row,) = correctness.check(shapes, [contestants.EAGER], "cpu")
    assert word in row["wrong"]
    assert bool(row["wrong"]) == (fault != "none")


class PretendedGraph:
    """Replays nothing."""

    def replay(self) -> None:
        """Takes no time."""


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Lets the command run as on a GPU, on small shapes, with clocks that always say the same."""
    pytest.importorskip("triton")
    from tools.bench_losses import clock, step, sweep

    shapes = [SMALL._replace(loss=loss) for loss in LOSSES]
    machine = {"gpu": "pretended", "driver": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_kernels, "describe", lambda commit: {**machine, "commit": commit})
    check, names = correctness.check, contestants.names
    monkeypatch.setattr(
        correctness, "check", lambda s, n, device, save: check(s[:1], n, "cpu", save)
    )
    monkeypatch.setattr(contestants, "names", lambda shape: ["Liger", *names(shape)])
    monkeypatch.setattr(contestants, "_fused", lambda: reference)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(cells, "DEVICE", "cpu")
    monkeypatch.setattr(cells, "GOALS", shapes[:1])
    monkeypatch.setattr(cells, "NEXT", shapes[1:])
    monkeypatch.setattr(cells, "rest", lambda: [[SMALL._replace(batch=32)]])
    monkeypatch.setattr(sweep, "SHAPES", shapes[:2])
    monkeypatch.setattr(step, "_steps_ms", lambda: dict.fromkeys(STEPS, 100.0))
    monkeypatch.setattr(step, "IMAGENET", (SMALL.classes, SMALL.width))

    def graph_of(call: contestants.Call, sets: list[Inputs]) -> PretendedGraph:
        done = call(sets[0])
        if isinstance(done.out, StudentOut) and len(sets[0].truth) == SMALL.batch:
            raise RuntimeError("cannot be\ncaptured")
        return PretendedGraph()

    def interleaved(works: list[Any], order: random.Random) -> list[list[float]]:
        return [[18.0, 20.0, 20.0, 20.0, 22.0] for _ in works]

    costs = {"python_us": 5.0, "graph_node_us": 1.0}
    monkeypatch.setattr(capture, "require_device", lambda: None)
    monkeypatch.setattr(bench_kernels, "require_device", lambda: None)
    monkeypatch.setattr(capture, "synchronization", lambda work: "")
    monkeypatch.setattr(clock, "copy_bandwidth", lambda: 3000.0)
    monkeypatch.setattr(clock, "launch_cost", lambda: costs)
    monkeypatch.setattr(clock, "input_sets", lambda shape: [draw(shape, "cpu") for _ in range(2)])
    monkeypatch.setattr(clock, "warm_up", lambda call, sets: call(sets[1]))
    monkeypatch.setattr(clock, "graph_of", graph_of)
    monkeypatch.setattr(clock, "interleaved", interleaved)
    monkeypatch.setattr(clock, "launches", lambda call, x: 2)
    monkeypatch.setattr(clock, "extra_memory", lambda call, x: 1000)
    monkeypatch.setattr(clock, "wall", lambda call, sets: 50.0)
    return shapes


def run_pretended(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON, Markdown."""
    places = ["--out", str(folder / "out.json"), "--markdown", str(folder / "out.md")]
    code = bench_kernels.main([*places, "--commit", "abc", *arguments])
    return code, json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text()


def test_a_whole_run(pretended_gpu: list[Shape], tmp_path: Path) -> None:
    code, result, page = run_pretended(tmp_path)
    assert code == 0
    assert result["machine"]["commit"] == "abc"
    assert [row["wrong"] for row in result["correctness"]] == [""] * (4 * 2 + 4 + 4 - 2)
    # Auto-tuning and Liger besides the five; what has no gradient is not recomputed. The step's
    # batches of 128 are measured without those two.
    per_batch = [sum(c["batch"] == batch for c in result["cells"]) for batch in (16, 32, 128)]
    assert per_batch == [7 + 7 + 6 + 6, 6, 5 + 5 + 4 + 4]
    assert result["skipped"] == []
    for one in result["cells"]:
        if one["contestant"] == "Liger":
            assert "ModuleNotFoundError" in one["failed"]
            continue
        assert one["error"]["wrong"] == ""
        assert one["wall_us"] == 50.0
        if one["loss"] == "student" and one["batch"] == SMALL.batch:
            assert one["not_capturable"] == "RuntimeError: cannot be captured"
        else:
            assert one["graph_us"] == {"median": 10.0, "p20": 9.2, "p80": 10.8, "replays": 5}
            assert one["gb_per_s"] == pytest.approx(one["minimal_bytes"] / 1e4)
            assert one["share_of_copy"] == pytest.approx(one["gb_per_s"] / 3000.0)
            assert one["times_compile"] == one["times_plain"] == 1.0
    assert [one["confirmed"] for one in result["sweep"]] == [True, False]
    assert result["noise"] == 0.0
    row = "| teacher | 10 | 12 | 16 | float32 | torch.compile | 10.0 | 9.2 to 10.8 | 50 |"
    assert row in page
    assert "3000 GB/s" in page


def test_the_share_of_a_step_is_of_all_that_it_computes(
    pretended_gpu: list[Shape], tmp_path: Path
) -> None:
    """Teacher, student, labels, and the labeled loss before and after with their difference."""
    _, result, page = run_pretended(tmp_path)
    # 4 losses of 10 us each in 100 ms.
    assert result["step"]["share"] == pytest.approx(dict.fromkeys(MEASURED, 0.0004))
    assert "eager, plain 0.04 %" in page
    calls: list[str] = []

    def smoothed_ce(*args: Any, **kwargs: Any) -> CEOut:
        calls.append("smoothed_ce")
        return reference.smoothed_ce(*args, **kwargs)

    spied: Any = types.SimpleNamespace(smoothed_ce=smoothed_ce)
    shape = SMALL._replace(loss="feedback")
    x = draw(shape, "cpu")
    out = contestants._feedback(spied, x, 10)
    assert calls == ["smoothed_ce", "smoothed_ce"]
    assert out.h.item() == pytest.approx((out.old - out.new).item())
    assert out.old.item() != out.new.item()


def test_contestants_of_a_shape_are_timed_in_turns_and_liger_after_all(
    pretended_gpu: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = contestants.definition(SMALL._replace(loss="student"))
    monkeypatch.setattr(others, "liger", lambda shape: definition)
    captured: list[int] = []

    def noted(works: list[Any], order: random.Random) -> list[list[float]]:
        captured.append(len(works))
        return [[20.0, 20.0] for _ in works]

    from tools.bench_losses import clock

    monkeypatch.setattr(clock, "interleaved", noted)
    result: dict[str, Any] = {"cells": [], "skipped": [], "correctness": []}
    saved: list[int] = []
    run = progress.Progress(result, float("inf"), lambda: saved.append(len(result["cells"])))
    shape = SMALL._replace(loss="student", batch=32)
    cells.measure(shape, ["Liger", *MEASURED], run, random.Random(0))
    assert captured == [5, 0]  # never Liger's graph
    assert [c["contestant"] for c in result["cells"]] == [*MEASURED, "Liger"]
    assert result["cells"][-1]["not_capturable"] == "it synchronizes"
    assert saved == [1, 2, 3, 4, 5, 6, 6]  # after every cell, and after the last rounds


def test_order_is_random_and_can_be_repeated(
    pretended_gpu: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [SMALL._replace(batch=8 * n) for n in range(3, 11)]
    monkeypatch.setattr(cells, "NEXT", many)
    monkeypatch.setattr(cells, "measure", lambda shape, who, run, order: seen.append(shape.batch))
    orders = []
    for seed in ("1", "1", "2"):
        seen: list[int] = []
        run_pretended(tmp_path, "--seed", seed)
        orders.append([batch for batch in seen if batch not in (16, 128)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:8]) == sorted(orders[2][:8]) == [shape.batch for shape in many]
    assert orders[0][8:] == [32]  # what is less important follows


def test_what_there_is_no_time_for_is_said(pretended_gpu: list[Shape], tmp_path: Path) -> None:
    code, result, page = run_pretended(tmp_path, "--minutes", "0")
    assert code == 0
    assert result["cells"] == result["sweep"] == []
    assert len(result["correctness"]) == 14  # never left out
    assert f"no time: {pretended_gpu[0]}, torch.compile" in result["skipped"]
    assert "no time: the losses' share of a ResNet-50 step" in result["skipped"]
    assert f"Skipped: no time: {pretended_gpu[0]}, torch.compile" in page


@pytest.mark.parametrize("place", ["at the start", "at its shape"])
def test_a_wrong_contestant_is_marked_and_not_timed(
    place: str,
    pretended_gpu: list[Shape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ours, at all shapes, or torch.compile, which compiles anew for each."""
    build, call = contestants.build, broken("gradient")
    who = contestants.RECOMPUTE if place == "at the start" else contestants.COMPILED

    def wrong(name: str, shape: Shape) -> contestants.Call:
        return call if name == who and shape == SMALL else build(name, shape)

    monkeypatch.setattr(contestants, "build", wrong)
    monkeypatch.setattr(correctness, "BATCH", SMALL.batch)
    monkeypatch.setattr(correctness, "SHAPES", [(10, 12, torch.float32)])
    code, result, page = run_pretended(tmp_path)
    assert code == 1
    mine = [c for c in result["cells"] if c["contestant"] == who and c["loss"] == "teacher"]
    marked = [c for c in mine if "wrong" in c]
    assert {c["batch"] for c in marked} == ({16, 32, 128} if place == "at the start" else {16})
    assert all("the gradient is off" in c["wrong"] for c in marked)
    assert not any("graph_us" in c or "wall_us" in c for c in marked)
    assert all("graph_us" in c for c in result["cells"] if c["contestant"] == "eager, plain"
               and c["loss"] == "teacher")  # fmt: skip
    assert "wrong: " in page
    assert "the gradient is off" in capsys.readouterr().out


def test_a_lost_device_ends_the_run_with_what_there_is(
    pretended_gpu: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise capture.DeviceLostError("the device is unusable: launch failure")

    monkeypatch.setattr(capture, "require_device", lost)  # asked after Liger's failure
    code, result, page = run_pretended(tmp_path)
    assert code == 3
    assert result["device"] == "the device is unusable: launch failure"
    assert "STOPPED: the device is unusable" in page
    assert [c["contestant"] for c in result["cells"]][-1] == "Liger"
    assert len(result["cells"]) == 7
    assert "sweep" not in result or result["sweep"] == []
