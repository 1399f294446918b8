"""The benchmark of the losses from end to end, with a pretended GPU: who is wrong, what is left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.kernels import reference
from tools import bench_kernels
from tools.bench_losses import cells, contestants, correctness
from tools.bench_losses.problems import Inputs, Shape, draw

SMALL = Shape("teacher", 10, 12, 16, torch.float32)
STEPS = ("step_ms_reference", "step_ms_triton")
MEASURED = ("eager", "torch.compile", "ours one-pass", "ours recompute")


def broken(fault: str) -> contestants.Call:
    """Plain PyTorch with one thing wrong."""
    sound = contestants.build(contestants.EAGER, SMALL)

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


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Lets the command run as on a GPU, on small shapes, with clocks that always say the same."""
    pytest.importorskip("triton")
    from tools.bench_losses import clock, step, sweep

    shapes = [SMALL._replace(loss=loss) for loss in ("teacher", "student", "pseudo")]
    machine = {"gpu": "pretended", "driver": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_kernels, "describe", lambda commit: {**machine, "commit": commit})
    check, names = correctness.check, contestants.names
    monkeypatch.setattr(correctness, "check", lambda s, n, device: check(s[:1], n, "cpu"))
    monkeypatch.setattr(contestants, "names", lambda shape: [*names(shape), "Liger"])
    monkeypatch.setattr(contestants, "_fused", lambda: reference)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(cells, "FIRST", shapes)
    monkeypatch.setattr(cells, "rest", lambda: iter([SMALL._replace(batch=32)]))
    monkeypatch.setattr(sweep, "SHAPES", shapes[:2])
    monkeypatch.setattr(step, "_steps_ms", lambda: dict.fromkeys(STEPS, 100.0))
    monkeypatch.setattr(step, "IMAGENET", (SMALL.classes, SMALL.width))

    def replayed(call: contestants.Call, sets: list[Inputs]) -> clock.Times:
        if call(sets[0]).gradient is None and len(sets[0].truth) == SMALL.batch:
            raise RuntimeError("cannot be\ncaptured")
        return clock.Times(10.0, 9.0, 11.0, 30)

    monkeypatch.setattr(clock, "copy_bandwidth", lambda: 3000.0)
    costs = {"python_us": 5.0, "graph_node_us": 1.0}
    monkeypatch.setattr(clock, "launch_cost", lambda: costs)
    monkeypatch.setattr(clock, "input_sets", lambda shape: [draw(shape, "cpu") for _ in range(2)])
    monkeypatch.setattr(clock, "warm_up", lambda call, sets: call(sets[1]))
    monkeypatch.setattr(clock, "replayed", replayed)
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
    assert [row["wrong"] for row in result["correctness"]] == [""] * (2 * 3 + 2)
    # Three shapes, of which pseudo labels have one contestant fewer, and one more of the rest; and
    # what the share of a step needs: batches of 128.
    per_batch = [sum(c["batch"] == batch for c in result["cells"]) for batch in (16, 32, 128)]
    assert per_batch == [5 + 5 + 4, 5, 4 + 4 + 3]
    assert result["skipped"] == []
    for one in result["cells"]:
        if one["contestant"] == "Liger":
            assert "failed" in one
        elif one["loss"] == "pseudo" and one["batch"] == SMALL.batch:
            assert one["not_capturable"] == "RuntimeError: cannot be captured"
        else:
            assert one["graph_us"] == {"median": 10.0, "p20": 9.0, "p80": 11.0, "replays": 30}
            assert one["gb_per_s"] == pytest.approx(one["minimal_bytes"] / 1e4)
            assert one["share_of_copy"] == pytest.approx(one["gb_per_s"] / 3000.0)
            if one["batch"] != 128:
                assert one["times_compile"] == 1.0
    assert [one["confirmed"] for one in result["sweep"]] == [True, True]
    assert result["noise"] == 0.0
    # 3 losses of 10 us each in 100 ms.
    assert result["step"]["share"] == pytest.approx(dict.fromkeys(MEASURED, 0.0003))
    assert "eager 0.03 %" in page
    assert "| teacher | 10 | 12 | 16 | float32 | torch.compile | 10.0 | 9.0 to 11.0 | 50 |" in page
    assert "3000 GB/s" in page


def test_what_there_is_no_time_for_is_said(pretended_gpu: list[Shape], tmp_path: Path) -> None:
    code, result, page = run_pretended(tmp_path, "--minutes", "0")
    assert code == 0
    assert result["cells"] == result["sweep"] == []
    assert len(result["correctness"]) == 8  # never left out
    assert f"{pretended_gpu[0]}, torch.compile" in result["skipped"]
    assert "the loss's share of a ResNet-50 step" in result["skipped"]
    assert f"Skipped: {pretended_gpu[0]}, torch.compile" in page


def test_nothing_is_timed_when_a_contestant_is_wrong(
    pretended_gpu: list[Shape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build, call = contestants.build, broken("gradient")

    def wrong(name: str, shape: Shape) -> contestants.Call:
        ours = (name, shape.loss) == (contestants.RECOMPUTE, "teacher")
        return call if ours else build(name, shape)

    monkeypatch.setattr(contestants, "build", wrong)
    monkeypatch.setattr(correctness, "BATCH", SMALL.batch)
    code, result, page = run_pretended(tmp_path)
    assert code == 1
    assert result["cells"] == []
    assert "Nothing was timed" in page
    assert "WRONG: teacher" in capsys.readouterr().out
