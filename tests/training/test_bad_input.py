"""User errors end in one line, an exit code, and nothing overwritten."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mpl_fast import train
from tests.tiny_run import arguments, run

Command = Callable[[list[str]], tuple[int, str]]


@pytest.fixture
def train_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; returns its exit code and its stderr."""

    def run_main(options: list[str]) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train.py", *options])
        try:
            code = train.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capfd.readouterr().err

    return run_main


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--data.root TMP/nowhere", 4, ["nowhere"]),
        ("--data.root TMP", 4, ["TMP"]),  # an empty folder
        ("--model.classes 7", 2, ["model.classes is 7", "has 10 classes"]),
        ("--labeled-batch 500", 2, ["labeled_batch 500 is larger than the"]),
        ("--unlabeled-batch 500", 2, ["unlabeled_batch 500 is larger than the"]),
        ("--model.name resnet51", 2, ["resnet51", "resnet50"]),
        ("--model.pretrained TMP/nowhere.pth", 2, ["there is no file TMP/nowhere.pth"]),
        (
            "--algorithm.held-out 0.5 --labeled-batch 1",
            2,
            ["labeled_batch 1 gives a rank one image"],
        ),
        ("--run-dir /proc/mpl_fast/run", 2, ["cannot be written"]),
        ("--cuda-graphs step", 2, ["cuda_graphs is step, but", "cpu: set off"]),
        ("--microbatches 3", 2, ["microbatches 3 does not divide the 4 labeled images"]),
        (
            "--microbatches 2 --algorithm.held_out 0.25",
            2,
            ["microbatches 2 does not divide the 3 labeled images that a rank learns from"],
        ),
        (
            "--algorithm.teacher.optimizer_backend apex",
            2,
            ["optimizer_backend apex needs NVIDIA's apex, which is not installed"],
        ),
    ],
)
def test_one_line(
    options: str,
    code: int,
    words: list[str],
    train_command: Command,
    tiny_rec: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    given = options.replace("TMP", str(tmp_path / "data")).split()
    ended, text = train_command([*arguments(tmp_path / "run", tiny_rec), *given])
    assert ended == code and text.count("\n") == 1, text
    assert all(part.replace("TMP", str(tmp_path / "data")) in text for part in words), text
    assert code != 4 or not (tmp_path / "run").exists()


def test_index_that_does_not_match(train_command: Command, tiny_rec: Path, tmp_path: Path) -> None:
    rec = shutil.copytree(tiny_rec, tmp_path / "rec")
    index = rec / "train_unlabel.idx"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-3]))
    code, text = train_command(arguments(tmp_path / "run", rec))
    assert code == 4 and text.count("\n") == 1 and "train_unlabel.idx" in text


def test_records_cut_short(train_command: Command, tiny_rec: Path, tmp_path: Path) -> None:
    rec = shutil.copytree(tiny_rec, tmp_path / "rec")
    os.truncate(rec / "val.rec", 1000)
    code, text = train_command(arguments(tmp_path / "run", rec))
    assert code == 4 and text.count("\n") == 1 and "val.rec" in text


def test_fine_tuning_of_a_run_that_is_not_there(
    train_command: Command, tiny_rec: Path, tmp_path: Path
) -> None:
    """Nothing is left behind that would make the right command fail."""
    start = tmp_path / "nowhere"
    options = ["--data.root", str(tiny_rec), "--run-dir", str(tmp_path / "run"), "--epochs", "1"]
    options += ["--recipe", "finetune", "--algorithm.start", str(start), "--device", "cpu"]
    options += ["--model.name", "wrn_10_1", "--labeled-batch", "4", "--data.image-size", "16"]
    code, text = train_command(options)
    assert code == 2 and text.count("\n") == 1
    assert f"algorithm.start: there is no folder {start}" in text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_cuda_asked_for_and_absent(
    train_command: Command, tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, text = train_command([*arguments(tmp_path / "run", tiny_rec), "--device", "cuda"])
    assert code == 2 and text.count("\n") == 1 and "no GPU" in text


def test_run_directory_that_is_a_file(
    train_command: Command, tiny_rec: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("precious")
    code, text = train_command(arguments(tmp_path / "run", tiny_rec))
    assert code == 2 and text.count("\n") == 1 and "cannot be written" in text
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.slow
def test_run_directory_of_another_config(
    train_command: Command, tiny_rec: Path, tmp_path: Path
) -> None:
    options = arguments(tmp_path / "run", tiny_rec)
    assert run([*options, "--stop-at", "2"]).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, text = train_command([*options, "--seed", "9"])
    assert code == 2 and text.count("\n") == 1 and "seed was 0 and is 9" in text
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_mistake_can_be_mended_before_the_first_checkpoint(
    train_command: Command, tiny_rec: Path, tmp_path: Path
) -> None:
    options = arguments(tmp_path / "run", tiny_rec)
    code, _ = train_command([*options, "--model.name", "resnet51"])
    assert code == 2 and (tmp_path / "run" / "config.yaml").exists()
    mended = run([*options, "--stop-at", "1", "--algorithm.student.delay-steps", "9"])
    assert mended.returncode == 0, mended.stderr
    assert "warning: the student never moves: its delay of 9 steps" in mended.stderr


@pytest.mark.slow
def test_two_runs_in_one_directory(train_command: Command, tiny_rec: Path, tmp_path: Path) -> None:
    import fcntl

    options = arguments(tmp_path / "run", tiny_rec)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, text = train_command(options)
    assert code == 2 and "in use by another run" in text


@pytest.mark.slow
def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    tiny_rec: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = arguments(folder, tiny_rec)
    assert run([*options, "--stop-at", "2"]).returncode == 0
    saved = {p: p.read_bytes() for p in folder.glob("checkpoints/**/*.pt")}
    for file in (folder / "config.yaml", tmp_path / "mpl_dali.yaml"):
        file.write_text(file.read_text().replace("lr: 0.05", "lr: 1.0e+30"))
    failed = run(options)
    assert failed.returncode == 5, failed.stderr
    errors = [line for line in failed.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "the checkpoint of step 2 is kept" in errors[0]
    assert {p: p.read_bytes() for p in folder.glob("checkpoints/**/*.pt")} == saved
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_an_error_is_printed_once_under_torchrun(tiny_rec: Path, tmp_path: Path) -> None:
    """By rank 0, though it occurs on both ranks; torchrun adds a report of its own."""
    (tmp_path / "run").write_text("in the way")
    failed = run(arguments(tmp_path / "run", tiny_rec), ranks=2)
    assert failed.returncode != 0
    assert failed.stderr.count("train: error:") == 1, failed.stderr
    assert "mpl_fast/training" not in failed.stderr  # no traceback through our code
