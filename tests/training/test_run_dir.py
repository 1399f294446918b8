"""What a run leaves behind, and what the tools make of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import ROOT, arguments, environment, final_state, rows, run


@pytest.fixture(scope="module")
def finished(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rundir") / "run"
    done = run(arguments(folder, tiny_rec))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_everything_promised_is_there(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["steps"] == 6 and config["data"]["hw_decoder_load"] == 0.65  # defaults too
    env = json.loads((finished / "env.json").read_text())
    assert env["versions"]["torch"] and env["devices"] and "git_commit" in env
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["count"] == 50 and summary["train_seconds"] > 0
    assert list((finished / "tensorboard").glob("events.out.tfevents*"))
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]


def test_rows_say_what_happened(finished: Path) -> None:
    training = [r for r in rows(finished) if "train_seconds" in r]
    assert [r["step"] for r in training] == [2, 4, 6]
    wanted = {
        "loss/labeled",
        "loss/consistency",
        "loss/student",
        "mask_rate",
        "feedback",
        "lr/student",
    }
    assert all(wanted <= r.keys() for r in training)
    evaluations = [r for r in rows(finished) if "eval/top1" in r]
    assert [r["step"] for r in evaluations] == [4, 6]
    assert evaluations[-1]["eval/count"] == 50


@pytest.mark.slow
def test_evaluate_tool_finds_the_same_on_one_rank_and_two(finished: Path, tiny_rec: Path) -> None:
    expected = final_state(finished)["accuracy"]
    line = f"top-1 {expected['top1']:.2f} %, top-5 {expected['top5']:.2f} % of 50 images"
    tool = [str(ROOT / "tools" / "evaluate.py"), str(finished), "--data.root", str(tiny_rec)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start in ([], launcher):
        done = subprocess.run(
            [sys.executable, *start, *tool],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(line) == 1, done.stdout


@pytest.mark.slow
def test_plot_tool_draws_the_curves(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    tool = [sys.executable, str(ROOT / "tools" / "plot.py"), str(finished), "--out", str(out)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


@pytest.mark.slow
def test_evaluate_tool_tells_of_a_missing_run_and_another_network(
    finished: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "evaluate.py")]
    for options, code, message in (
        ([str(tmp_path)], 2, "config.yaml does not exist"),
        ([str(finished), "--model.name", "resnet18"], 6, "is of another network"),
    ):
        done = subprocess.run([*tool, *options], capture_output=True, text=True, check=False)
        assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_plot_tool_survives_a_cut_line_and_says_when_there_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tool = [sys.executable, str(ROOT / "tools" / "plot.py"), str(tmp_path)]
    tool += ["--out", str(tmp_path / "c.png")]
    file.write_text('{"step": 1, "eval/top1": 3.0}\n{"step": 2, "eval/to')
    assert subprocess.run(tool, check=False).returncode == 0
    file.write_text("")
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "nothing to draw yet" in done.stderr


def test_plot_tool_refuses_a_folder_without_metrics(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "plot.py"), str(tmp_path)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "metrics.jsonl does not exist" in done.stderr
