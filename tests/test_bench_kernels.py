"""The benchmark of the losses counts right and tells who is wrong; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_kernels
from tools.bench_losses import cells, contestants, report
from tools.bench_losses.problems import LOSSES, Shape, draw

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "bench_kernels.py"
SMALL = Shape("teacher", 10, 12, 16, torch.float32)
ON_CPU = {"eager, plain", "eager, definition", "torch.compile", "torch.compile max-autotune"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The JSON of --smoke, what it printed, and its Markdown."""
    folder = tmp_path_factory.mktemp("bench")
    places = ["--out", str(folder / "out.json"), "--markdown", str(folder / "out.md")]
    command = [sys.executable, str(TOOL), "--smoke", *places]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "out.json").read_text())
    return result, done.stdout, (folder / "out.md").read_text()


def cell(result: dict[str, Any], loss: str, classes: int, who: str) -> dict[str, Any]:
    """The only one."""
    (found,) = (
        c
        for c in result["cells"]
        if (c["loss"], c["classes"], c["contestant"]) == (loss, classes, who)
    )
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_smoke_counts_launches_and_bytes(smoke: tuple[dict[str, Any], str, str]) -> None:
    result, printed, page = smoke
    for classes in (100, 1000):
        teacher = cell(result, "teacher", classes, "eager, definition")
        student = cell(result, "student", classes, "eager, definition")
        assert teacher["rows"] == 32 + 2 * 256
        assert teacher["minimal_bytes"] == 2 * 544 * classes * 2  # read and written, bfloat16
        assert student["minimal_bytes"] == 2 * 288 * classes * 2
        pseudo, feedback = (
            cell(result, loss, classes, "eager, plain") for loss in ("pseudo", "feedback")
        )
        assert pseudo["minimal_bytes"] == 256 * classes * 2
        assert feedback["minimal_bytes"] == 2 * 32 * classes * 2  # labeled rows, old and new
        # PyTorch goes over the logits again and again, least where nobody guards it.
        plain = cell(result, "teacher", classes, "eager, plain")
        assert 50 < plain["launches"] < teacher["launches"] < 150
        assert teacher["launches"] > student["launches"] > 25
        assert teacher["bytes"] == pytest.approx(
            teacher["times_minimal"] * teacher["minimal_bytes"]
        )
        assert teacher["times_minimal"] > plain["times_minimal"] > 8
        row = f"| teacher | {classes} | 256 | bfloat16 | eager, plain | {plain['launches']} |"
        assert row in page
    # What is launched does not depend on how many classes there are.
    for who in ("eager, plain", "eager, definition"):
        assert len({cell(result, "teacher", c, who)["launches"] for c in (100, 1000)}) == 1
    assert "teacher" in printed


@pytest.mark.slow
def test_smoke_covers_every_kind_of_contestant(smoke: tuple[dict[str, Any], str, str]) -> None:
    result, _, page = smoke
    covered = {c["contestant"] for c in result["cells"]}
    assert covered >= ON_CPU
    compiled = [c for c in result["cells"] if c["contestant"] in contestants.MODES]
    for one in compiled:
        definition = cell(result, one["loss"], one["classes"], "eager, definition")
        assert 0 < one["launches"] < definition["launches"]
        assert one["error"]["wrong"] == ""
    # What is left out is said: either for want of time, or because it needs a GPU.
    late = [line for line in result["skipped"] if line.startswith("no time")]
    assert len(compiled) + len(late) == 5
    for name in ("Liger", "apex"):
        assert any(line.startswith(f"{name}: ") for line in result["skipped"])
    assert all(f"Skipped: {line}" in page for line in result["skipped"])


@pytest.mark.slow
def test_smoke_runs_our_kernels_on_the_interpreter(
    smoke: tuple[dict[str, Any], str, str],
) -> None:
    pytest.importorskip("triton")
    ours = {
        (c["loss"], c["contestant"]): c
        for c in smoke[0]["cells"]
        if c["contestant"] in contestants.OURS
    }
    assert len(ours) == 6  # four losses in one pass, two recomputed
    assert all(one["error"]["wrong"] == "" for one in ours.values())
    # By the design: a kernel and a sum; one kernel that labels.
    assert ours["teacher", "ours one-pass"]["kernels"] == ["teacher_kernel"]
    assert ours["teacher", "ours one-pass"]["launches"] == 2
    assert ours["student", "ours one-pass"]["launches"] == 2
    assert ours["pseudo", "ours one-pass"]["launches"] == 1
    for loss in ("teacher", "student"):  # forward and backward
        assert len(ours[loss, "ours recompute"]["kernels"]) == 2
    assert len(ours["feedback", "ours one-pass"]["kernels"]) == 2  # old and new


@pytest.mark.slow
def test_smoke_makes_no_claim_about_speed(smoke: tuple[dict[str, Any], str, str]) -> None:
    result, printed, page = smoke
    for text in (printed, page, result["claim"]):
        assert "No claim about speed" in text
    assert result["machine"]["gpu"] is None
    assert result["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert not any("us" in key.split("_") for c in result["cells"] for key in c)


@pytest.mark.slow
def test_smoke_compares_with_float64(smoke: tuple[dict[str, Any], str, str]) -> None:
    rows = smoke[0]["correctness"]
    assert len(rows) == 3 * 4 * 2  # shapes, losses, contestants
    assert [row["wrong"] for row in rows] == [""] * 24
    assert all(row["statistics"] < 2e-6 for row in rows)
    assert sum("gradient" in row for row in rows) == 12  # pseudo labels and feedback have none


@pytest.mark.slow
def test_smoke_compiles_a_kernel(smoke: tuple[dict[str, Any], str, str]) -> None:
    pytest.importorskip("triton")
    result, printed, _ = smoke
    assert result["aot_faults"] == []
    (kernel,) = result["aot"]
    assert kernel["job"]["arch"] == 90
    assert 0 < kernel["registers"] <= 180
    assert kernel["kernel"] in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_kernels.main(["--out", str(tmp_path / "out.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "--smoke" in printed.err
    assert not list(tmp_path.iterdir())


def test_the_grid_is_whole() -> None:
    """4 losses: ImageNet at 4 batches, ImageNet-21k padded and odd at 3; float32 at one of them."""
    classes = [cells.GOALS, cells.NEXT, *cells.rest()]
    grid = [shape for shapes in classes for shape in shapes]
    assert len(grid) == len(set(grid)) == 4 * (4 + 3 + 3) + 4 * 3
    assert {shape.width for shape in grid} == {1000, 21888, 21841}
    assert all(shape.batch == 4096 for shape in grid if shape.dtype == torch.float32)
    assert all(shape.batch <= 4096 for shape in grid if shape.width != 1000)
    assert {shape.loss for shape in cells.GOALS} == {"teacher"}
    assert "torch.compile max-autotune" in cells.entrants(cells.NEXT[0])
    assert "torch.compile max-autotune" not in cells.entrants(classes[-1][0])


def test_inputs_have_the_shape_that_is_counted() -> None:
    for loss, rows in zip(LOSSES, (2 + 2 * 16, 2 + 16, 16, 2 * 2), strict=True):
        shape = SMALL._replace(loss=loss)
        x = draw(shape, "cpu")
        assert x.logits.shape == (shape.rows, 12) == (rows, 12)
        assert shape.logit_bytes == rows * 12 * 4
        assert int(x.target.max()) < 10


def test_ratios_are_to_the_copy_to_torch_compile_and_to_plain_eager() -> None:
    def timed(who: str, batch: int, microseconds: float) -> dict[str, Any]:
        key = {"loss": "teacher", "classes": 10, "width": 12, "batch": batch, "dtype": "float32"}
        times = {"graph_us": {"median": microseconds}, "gb_per_s": 3000.0 / microseconds}
        return {**key, "contestant": who, **times}

    rows = [timed("torch.compile", 16, 4.0), timed("ours one-pass", 16, 2.0), timed("x", 32, 1.0)]
    rows += [timed("eager, plain", 16, 8.0), timed("eager, definition", 16, 16.0)]
    report.ratios(rows, 3000.0)
    assert [row.get("times_compile") for row in rows] == [1.0, 2.0, None, 0.5, 0.25]
    assert [row.get("times_plain") for row in rows] == [2.0, 4.0, None, 1.0, 0.5]
    assert [row["share_of_copy"] for row in rows] == [0.25, 0.5, 1.0, 0.125, 0.0625]
    assert report.HEADER[-2:] == ("times torch.compile", "times eager, plain")


def test_a_configuration_that_is_not_the_fastest_is_a_suggestion() -> None:
    pytest.importorskip("triton")
    from mpl_fast.kernels.launch import launch_config
    from tools.bench_losses import sweep

    def tried(*microseconds: float) -> dict[str, Any]:
        return sweep.verdict([{"block": n, "us": us} for n, us in enumerate(microseconds)])

    assert tried(1.0, 2.0, 3.0)["confirmed"]
    assert tried(1.01, 1.0)["confirmed"]  # within the noise
    assert not tried(2.0, 1.0)["confirmed"]
    assert tried(2.0, 1.0)["best"]["block"] == 1
    assert not sweep.verdict([{"failed": "no registers"}, {"block": 1, "us": 1.0}])["confirmed"]
    table = launch_config(1000)
    assert sweep.candidates(1000)[0] == table
    assert len({*sweep.candidates(1000)}) == len(sweep.candidates(1000)) >= 4
    assert not any(one.single for one in sweep.candidates(21888))


def test_a_forced_configuration_reaches_the_launch() -> None:
    pytest.importorskip("triton")
    from mpl_fast.kernels import aot
    from mpl_fast.kernels.launch import Launch, launch_config
    from tools.bench_losses import sweep

    if aot.unable():
        pytest.skip("the interpreter compiles nothing")
    job = aot.Job(90, "pseudo_labels arg-max", 100, 100, "float32")

    def warps() -> int:
        kernels = aot.compile_job(job)
        assert not isinstance(kernels, str)
        return kernels[0].warps

    assert warps() == launch_config(100).warps
    for config in (Launch(64, False, 2), Launch(128, True, 4)):
        with sweep.forced(config):
            assert warps() == config.warps
    assert warps() == launch_config(100).warps
