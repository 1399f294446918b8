"""The benchmark of the losses counts right and tells who is wrong; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_kernels
from tools.bench_losses import cells, report
from tools.bench_losses.problems import Shape, draw

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "bench_kernels.py"
SMALL = Shape("teacher", 10, 12, 16, torch.float32)


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
        teacher = cell(result, "teacher", classes, "eager")
        student = cell(result, "student", classes, "eager")
        assert teacher["rows"] == 32 + 2 * 256
        assert teacher["minimal_bytes"] == 2 * 544 * classes * 2  # read and written, bfloat16
        assert student["minimal_bytes"] == 2 * 288 * classes * 2
        assert cell(result, "pseudo", classes, "eager")["minimal_bytes"] == 256 * classes * 2
        # Plain PyTorch goes over the logits again and again.
        assert 50 < teacher["launches"] < 150
        assert teacher["launches"] > student["launches"] > 25
        assert teacher["bytes"] == pytest.approx(
            teacher["times_minimal"] * teacher["minimal_bytes"]
        )
        assert teacher["times_minimal"] > 8
        assert f"| teacher | {classes} | 256 | bfloat16 | eager | {teacher['launches']} |" in page
    # What is launched does not depend on how many classes there are.
    counts = {cell(result, "teacher", c, "eager")["launches"] for c in (100, 1000)}
    assert len(counts) == 1
    compiled = [c for c in result["cells"] if c["contestant"] == "torch.compile"]
    assert len(compiled) + len(result["skipped"]) == 6
    for one in compiled:
        plain = cell(result, one["loss"], one["classes"], "eager")
        assert 0 < one["launches"] < plain["launches"]
    assert "teacher" in printed


@pytest.mark.slow
def test_smoke_makes_no_claim_about_speed(smoke: tuple[dict[str, Any], str, str]) -> None:
    result, printed, page = smoke
    for text in (printed, page, result["claim"]):
        assert "No claim about speed" in text
    assert result["machine"]["gpu"] is None
    assert result["machine"]["torch"] == torch.__version__
    assert not any("us" in key.split("_") for c in result["cells"] for key in c)


@pytest.mark.slow
def test_smoke_compares_with_float64(smoke: tuple[dict[str, Any], str, str]) -> None:
    rows = smoke[0]["correctness"]
    assert len(rows) == 9  # three shapes of three losses
    assert [row["wrong"] for row in rows] == [""] * 9
    assert all(row["statistics"] < 2e-6 for row in rows)
    assert sum("gradient" in row for row in rows) == 6  # pseudo labels have none


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
    """3 losses: ImageNet at 4 batches, ImageNet-21k padded and odd at 3; float32 at one of them."""
    grid = [*cells.FIRST, *cells.rest()]
    assert len(grid) == len(set(grid)) == 3 * (4 + 3 + 3) + 3 * 3
    assert {shape.width for shape in grid} == {1000, 21888, 21841}
    assert all(shape.batch == 4096 for shape in grid if shape.dtype == torch.float32)
    assert all(shape.batch <= 4096 for shape in grid if shape.width != 1000)


def test_inputs_have_the_shape_that_is_counted() -> None:
    for loss, rows in (("teacher", 2 + 2 * 16), ("student", 2 + 16), ("pseudo", 16)):
        shape = SMALL._replace(loss=loss)
        x = draw(shape, "cpu")
        assert x.logits.shape == (shape.rows, 12) == (rows, 12)
        assert shape.logit_bytes == rows * 12 * 4
        assert int(x.target.max()) < 10


def test_ratios_are_to_the_copy_and_to_torch_compile() -> None:
    def timed(who: str, batch: int, microseconds: float) -> dict[str, Any]:
        key = {"loss": "teacher", "classes": 10, "width": 12, "batch": batch, "dtype": "float32"}
        times = {"graph_us": {"median": microseconds}, "gb_per_s": 3000.0 / microseconds}
        return {**key, "contestant": who, **times}

    rows = [timed("torch.compile", 16, 4.0), timed("ours one-pass", 16, 2.0), timed("x", 32, 1.0)]
    report.ratios(rows, 3000.0)
    assert [row.get("times_compile") for row in rows] == [1.0, 2.0, None]
    assert [row["share_of_copy"] for row in rows] == [0.25, 0.5, 1.0]


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
