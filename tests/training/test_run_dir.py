"""What a run leaves behind, and what the tools make of it."""

import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from mpl_fast.config import RunConfig, UDAConfig
from mpl_fast.errors import ConfigError, OutputError, run_command
from mpl_fast.training import environment
from mpl_fast.training.curves import read
from mpl_fast.training.run_dir import RunDir, closing
from mpl_fast.training.tensorboard import Board
from tests.tiny_run import ROOT, arguments, events, final_state, rows, run_here, train_here
from tools.evaluate import main as evaluate_command
from tools.plot import main as plot_command


@pytest.fixture(scope="module")
def finished(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rundir") / "run"
    done = train_here(*arguments(folder, tiny_rec))
    assert done.returncode == 0, done.stderr
    return folder


def test_everything_promised_is_there(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["steps"] == 6 and config["data"]["hw_decoder_load"] == 0.65  # defaults too
    env = json.loads((finished / "env.json").read_text())
    assert env["versions"]["torch"] and env["devices"] and "git_commit" in env
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["count"] == 50 and summary["train_seconds"] > 0
    assert list((finished / "tensorboard").glob("events.out.tfevents*"))
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000006"]
    status = json.loads((finished / "status.json").read_text())
    assert status["state"] == "complete" and status["step"] == status["steps"] == 6
    assert status["top1"] == summary["top1"] and status["images_per_second"] > 0
    found = [(event["step"], event["event"]) for event in events(finished)]
    saves = [event["seconds"] for event in events(finished) if event["event"] == "checkpoint"]
    assert summary["checkpoint_seconds"] == pytest.approx(sum(saves)) and min(saves) > 0
    checkpoints = [(step, "checkpoint") for step in (2, 4, 6)]
    assert found == [(0, "started"), *checkpoints, (6, "complete")]


def test_rows_say_what_happened(finished: Path) -> None:
    training = [r for r in rows(finished) if "train_seconds" in r]
    assert [r["step"] for r in training] == [2, 4, 6]
    wanted = {"loss/labeled", "loss/consistency", "loss/student", "mask_rate", "feedback"}
    assert all(wanted | {"lr/student"} <= r.keys() for r in training)
    evaluations = [r for r in rows(finished) if "eval/top1" in r]
    assert [r["step"] for r in evaluations] == [4, 6]
    assert evaluations[-1]["eval/count"] == 50


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a disk that is full: no file can become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(run_dir=str(tmp_path / "run"), algorithm=UDAConfig())


def test_a_full_disk_at_the_start_is_an_output_error(config: RunConfig) -> None:
    with file_size_limit(10), pytest.raises(OutputError, match="File too large"):
        RunDir(config)


@pytest.mark.parametrize("call", ["os.fsync", "mpl_fast.atomic.sync_folder"])
def test_an_io_error_at_the_start_is_an_output_error(
    call: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(call, fails)
    with pytest.raises(OutputError, match=r"run: Input/output error$"):
        RunDir(config)


def test_a_full_disk_later_is_a_warning_and_no_row_is_lost(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The curves end, and neither they nor the rows are waited for."""
    run_dir, folder = RunDir(config), Path(config.run_dir)
    run_dir.resume_at(-1)
    for outage in range(2):
        with file_size_limit(3_000):
            for step in range(1000 * outage, 1000 * outage + 900):  # more than a usual buffer
                run_dir.row(step, {"loss/labeled": 0.5})
            run_dir.sync()
        for step in range(1000 * outage + 900, 1000 * outage + 1000):
            run_dir.row(step, {"loss/labeled": 0.5})
    run_dir.close()
    assert [row["step"] for row in rows(folder)] == [*range(2000)]
    warnings = capsys.readouterr().err.splitlines()
    reason = "cannot be written (File too large): "
    metrics = f"warning: {folder}/metrics.jsonl {reason}its rows wait in memory"
    curves = f"warning: {folder}/tensorboard {reason}no curves are drawn until the run is resumed; "
    assert sorted(warnings) == [metrics, metrics, f"{curves}metrics.jsonl has all rows"]


def test_a_full_disk_at_a_resume_is_one_line(config: RunConfig) -> None:
    """Also where the reason is then added to metrics.jsonl."""
    run_dir = RunDir(config)
    limit, wanted = file_size_limit(10), pytest.raises(OutputError, match=r"run: File too large$")
    with limit, wanted, closing(run_dir):
        run_dir.resume_at(-1)


def test_rows_that_can_never_be_written_end_the_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpl_fast.training.run_dir.HELD_BACK", 2_000)
    run_dir = RunDir(config)
    run_dir.resume_at(-1)
    wanted = r"metrics\.jsonl: File too large"
    with file_size_limit(1_000):
        with pytest.raises(OutputError, match=wanted):
            for step in range(1000):
                run_dir.row(step, {"loss/labeled": 0.5})
        with pytest.raises(OutputError, match=wanted):
            run_dir.close()


FOREIGN = [
    b"my own line",
    b'{"step": "a"}',
    b'{"step": 1.5}',
    b'{"loss": 1}',
    b'{"step": 1, "note": "x"}',
    b"[1]",
    b"\xff\0",
    b"[" * 9999,
]
ROW, LATER = b'{"step": 4, "loss/labeled": 0.5}', b'{"step": 5, "loss/labeled": 0.5}'


def test_a_foreign_line_in_the_metrics_is_passed_over_and_kept(config: RunConfig) -> None:
    run_dir, file = RunDir(config), Path(config.run_dir) / "metrics.jsonl"
    kept = b"\n".join([*FOREIGN, ROW, b""])
    file.write_bytes(kept + LATER + b"\n" + ROW[:-4])
    assert read(file.parent) == {"loss/labeled": [(4, 0.5), (5, 0.5)]}
    run_dir.resume_at(4)
    run_dir.close()
    assert file.read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"top1": 9.0}', b"\xff", b"[" * 9999])
def test_a_damaged_summary_is_none(content: bytes, config: RunConfig) -> None:
    """A run that is complete then writes it again."""
    with contextlib.closing(RunDir(config)) as run_dir:
        (run_dir.path / "summary.json").write_bytes(content)
        assert run_dir.summary() is None
        sound = {"top1": 50.0, "steps": 6, "train_seconds": 2.5, "images_per_second": 9.0}
        (run_dir.path / "summary.json").write_text(json.dumps(sound))
        assert run_dir.summary() == sound


COMMANDS = ("status", "plot", "evaluate", "report", "export", "predict", "train")
FILES = {  # each damaged in a way of its own, by which a command would end in a traceback
    "config.yaml": b"a: " + b"[" * 9999,
    "summary.json": b"[" * 100_000,
    "env.json": b'["\xff"]',
    "status.json": b"[" * 100_000,
    "metrics.jsonl": b"[" * 100_000 + b'\n{"step": 1%s}\n\xff\n{"step": 2, "x": 1' % (b"0" * 400),
    "checkpoints/step_00000006/checkpoint.json": b'{"format": "x", "files": []',
    "report_cache/classes_0.npz": b"PK",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_damaged_file_of_a_run_is_a_traceback(
    name: str, finished: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    """One line, or the command goes on without the file."""
    given: dict[str, list[object]] = {
        "plot": ["--out", tmp_path / "curves.png"],
        "report": ["--out", tmp_path / "report.html", "--points", 10, "--unlabeled", 10, "--force"],
        "export": ["--out", tmp_path / "model.safetensors", "--force"],
        "predict": [f"{tiny_rec}:val", "--out", tmp_path / "out.csv", "--force"],
    }
    run = tmp_path / "run"
    for file, damaged in FILES.items():
        shutil.copytree(finished, run)
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).write_bytes(damaged)
        if name == "train":
            done = train_here(*arguments(run, tiny_rec))
        else:
            module = importlib.import_module(f"tools.{name}")
            line = [str(one) for one in (run, *given.get(name, []))]
            done = run_here(partial(run_command, name, module.main), line)
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(errors) == (done.returncode != 0), done.stderr
        assert done.returncode in (0, 2, 4, 6), file
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "content", [b"", b"- a", b"a: [", b"\xff", b"2001-99-99", b"? [a]\n: b", b"~: 1"]
)
def test_a_damaged_config_is_one_line(content: bytes, config: RunConfig) -> None:
    file = Path(config.run_dir) / "config.yaml"
    (file.parent / "checkpoints/step_00000004").mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=config.run_dir) as caught:
        RunDir(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [{"hang_timeout": 1200.0}, {"lock": False}, {"on_spike": "rollback"}, {"compile": "on"}],
)
def test_a_run_resumes_with_other_options_that_change_no_step(
    other: dict[str, Any], config: RunConfig
) -> None:
    """Such as a larger --hang-timeout, which the watchdog advises."""
    RunDir(config).close()
    (Path(config.run_dir) / "checkpoints/step_00000004").mkdir(parents=True)
    RunDir(replace(config, **other)).close()
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        RunDir(replace(config, seed=1, **other))


def test_another_commit_is_a_warning(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [{"git_commit": name} for name in ("a1", None, "a1", "a1", "b2")]
    found = []
    for present in environments:
        monkeypatch.setattr(environment, "environment", lambda present=present: present)
        with contextlib.closing(RunDir(config)) as run_dir:
            found.append(run_dir.other_commit)
    warning = "resumed with another program: the git commit was a1 and is b2"
    assert found == ["", "", "", "", warning]


def test_a_slow_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system."""
    expired = subprocess.TimeoutExpired("git", 10)
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=expired))
    assert environment.environment()["git_commit"] is None


def test_curves_on_a_full_disk_are_an_oserror(tmp_path: Path) -> None:
    board = Board(tmp_path, 1)
    with file_size_limit(1_000), pytest.raises(OSError, match="File too large"):
        for step in range(1000):
            board.row(step, {"loss/labeled": 0.5})


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (["checkpoints"], "summary.json"),
        (["checkpoints", "summary.json"], "metrics.jsonl up to step 6"),
        (["checkpoints/step_00000004", "checkpoints/step_00000006", "summary.json"], "metrics.j"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    gone: list[str], left: str, finished: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in gone:
        shutil.rmtree(run / name) if "check" in name else (run / name).unlink()
    if left == "metrics.j":
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8}\n')
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    done = train_here(*arguments(run, tiny_rec), "--seed", "5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{run} has the {left}" in done.stderr
    assert "put its checkpoints back to resume it, or use another --run-dir" in done.stderr
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path), checkpoint_every=500)
    RunDir(config).close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 900}\n')
    RunDir(config).close()
    (tmp_path / "config.yaml").write_text("checkpoint_every: often\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml is damaged: its checkpoint_every is 'often'"
    ):
        RunDir(config)


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(lambda: run_command("evaluate", evaluate_command), [*arguments])


def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(lambda: run_command("plot", plot_command), [*arguments])


def test_evaluate_finds_what_training_found(finished: Path, tiny_rec: Path) -> None:
    """On two ranks: test_resume.py."""
    expected = final_state(finished)["accuracy"]
    line = f"top-1 {expected['top1']:.2f} %, top-5 {expected['top5']:.2f} % of 50 images"
    done = evaluate(str(finished), "--data.root", str(tiny_rec))
    assert done.returncode == 0 and done.stdout.count(line) == 1


def test_evaluate_refuses_another_network_and_a_missing_run(finished: Path, tmp_path: Path) -> None:
    other = evaluate(str(finished), "--model.name", "resnet10t")
    assert other.returncode == 6 and "is of another network" in other.stderr
    tool = [sys.executable, str(ROOT / "tools" / "evaluate.py"), str(tmp_path)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "config.yaml does not exist" in done.stderr
    assert done.stderr.count("\n") == 1


def test_plot_draws_the_curves_but_for_a_cut_line(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as rows_file:
        rows_file.write('{"step": 2, "eval/to')
    out = tmp_path / "curves.png"
    done = plot(str(run), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    (run / "metrics.jsonl").write_text("")
    empty = plot(str(run), "--out", str(out))
    assert empty.returncode == 4 and "nothing to draw yet" in empty.stderr


def test_plot_draws_the_names_of_runs_literally(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    monkeypatch.chdir(tmp_path)
    names = ["$a_{1$", r"$\frac$", "_hidden", "%s", "not UTF-8: \udcff"]
    for name in names:
        Path(name).symlink_to(finished)
    done = plot(*names, "--out", "$x^2$.png")
    assert done.returncode == 0, done.stderr
    for axis in figures[0].axes:
        texts = axis.get_legend().get_texts()
        assert [text.get_text() for text in texts] == [*names[:4], r"not UTF-8: \udcff"]
        assert not any(text.get_parse_math() for text in texts)


def test_plot_on_a_full_disk_is_one_line(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "curves.png").symlink_to("/dev/full")
    full = plot(str(finished), "--out", str(tmp_path / "curves.png"))
    assert full.returncode == 3 and full.stderr.endswith("curves.png: No space left on device\n")


def test_plot_refuses_a_folder_without_metrics(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "plot.py"), str(tmp_path)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "metrics.jsonl does not exist" in done.stderr
