"""User errors end in one line, an exit code, and nothing overwritten."""

import fcntl
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_run import TRAIN, arguments, replace_state, run, train_here


def refused(code: int, *options: str) -> str:
    """The one line on stderr of a command that ends with this exit code."""
    done = train_here(*options)
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--data.root TMP/nowhere", 4, ["nowhere"]),
        ("--data.root TMP", 4, ["TMP"]),  # an empty folder
        ("--model.classes 7", 2, ["model.classes is 7", "has 10 classes"]),
        ("--labeled-batch 500", 2, ["labeled_batch 500 is larger than the"]),
        ("--unlabeled-batch 500", 2, ["unlabeled_batch 500 is larger than the"]),
        ("--model.name convlarge --data.image-size 8", 2, ["set data.image_size 32"]),
        ("--model.name resnet51", 2, ["resnet51", "resnet50"]),
        ("--model.pretrained TMP/nowhere.pth", 2, ["there is no file TMP/nowhere.pth"]),
        (
            "--algorithm.held-out 0.5 --labeled-batch 1",
            2,
            ["labeled_batch 1 gives a rank one image"],
        ),
        ("--run-dir /proc/mpl_fast/run", 2, ["cannot be written"]),
        ("--cuda-graphs step", 2, ["cuda_graphs is step, but", "cpu: set auto"]),
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
    options: str, code: int, words: list[str], tiny_rec: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    given = options.replace("TMP", str(tmp_path / "data")).split()
    text = refused(code, *arguments(tmp_path / "run", tiny_rec), *given)
    assert all(part.replace("TMP", str(tmp_path / "data")) in text for part in words), text
    unwritten = code == 4 or "--model.name" in options
    assert not unwritten or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "damage", "line"),
    [
        (
            "train_unlabel.idx",
            lambda f: f.write_text(f.read_text()[: len(f.read_text()) // 2]),
            "train_unlabel.idx: does not match the manifest",
        ),
        ("val.rec", lambda f: os.truncate(f, 1000), "val.rec: 1000 bytes, the manifest has "),
    ],
)
def test_records_that_do_not_match(
    name: str, damage: Callable[[Path], None], line: str, tiny_rec: Path, tmp_path: Path
) -> None:
    """At the start, not when DALI reads them."""
    rec = shutil.copytree(tiny_rec, tmp_path / "rec")
    damage(rec / name)
    assert line in refused(4, *arguments(tmp_path / "run", rec))


def test_fine_tuning_of_a_run_that_is_not_there(tiny_rec: Path, tmp_path: Path) -> None:
    """Nothing is left behind that would make the right command fail."""
    options = [*arguments(tmp_path / "run", tiny_rec, recipe="supervised"), "--recipe", "finetune"]
    text = refused(2, *options, "--algorithm.start", f"{tmp_path}/nowhere")
    assert f"algorithm.start: there is no folder {tmp_path}/nowhere" in text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_cuda_asked_for_and_absent(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = [*arguments(tmp_path / "run", tiny_rec), "--device", "cuda"]
    assert "no GPU" in refused(2, *options)


def test_run_directory_that_is_a_file(tiny_rec: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    assert "cannot be written" in refused(2, *arguments(tmp_path / "run", tiny_rec))
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize(("batch", "sizes"), [("4", "3 or 6"), ("2", "3")])
def test_a_batch_that_the_ranks_cannot_share(
    batch: str, sizes: str, tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refused(2, *arguments(tmp_path, tiny_rec), "--labeled-batch", batch, "--dry-run")
    assert f"labeled_batch {batch} is not divisible by 3 ranks: take {sizes}, or another" in line


def test_run_directory_of_another_config_or_of_a_divergence(tiny_rec: Path, tmp_path: Path) -> None:
    """Both leave the checkpoint as it was; and a mistake before it can be corrected."""
    options, folder = arguments(tmp_path / "run", tiny_rec), tmp_path / "run"
    refused(2, *options, "--model.pretrained", f"{tmp_path}/nowhere")
    assert (folder / "config.yaml").exists()
    begun = train_here(*options, "--stop-at", "2")
    assert begun.returncode == 0, begun.stderr
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "seed was 0 and is 9" in refused(2, *options, "--seed", "9")
    pretrained = refused(2, *options, "--model.pretrained", "a.pt")
    assert 'model.pretrained was "" and is a.pt' in pretrained
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    for file in (folder / "config.yaml", Path(options[1])):
        file.write_text(file.read_text().replace("lr: 0.05", "lr: 1.0e+30"))
    diverged = train_here(*options)
    assert diverged.returncode == 5 and diverged.stderr.count("error:") == 1, diverged.stderr
    assert "(the checkpoint of step 2 is kept)" in diverged.stderr
    saved = {p: content for p, content in before.items() if p.suffix == ".pt"}
    assert saved and {p: p.read_bytes() for p in folder.glob("checkpoints/**/*.pt")} == saved
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_checkpoint_with_foreign_values_is_one_line(tiny_rec: Path, tmp_path: Path) -> None:
    """Its networks fit and its checksums are right."""
    options = [*arguments(tmp_path / "run", tiny_rec, recipe="supervised"), "--patience", "3"]
    begun = train_here(*options, "--stop-at", "2")
    assert begun.returncode == 0, begun.stderr
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    lacks: dict[str, list[str]] = {
        "state.pt": ["step", "train_seconds", "accuracy"],
        "rank_0.pt": ["data", "torch", "cuda"],
    }
    wrong = {"step": "x", "accuracy": 3, "rollbacks": [], "best": {"top1": 1.0}, "torch": "x"}
    for name, keys in lacks.items():
        kept = torch.load(checkpoint / name, weights_only=True)
        changed = [{k: v for k, v in kept.items() if k != key} for key in keys]
        changed += [kept | {k: v} for k, v in wrong.items() if k in kept]
        for state in changed:
            replace_state(checkpoint / name, state)
            line = refused(6, *options)
            assert f"error: {checkpoint} is not of this program (" in line
        replace_state(checkpoint / name, kept)
    assert train_here(*options).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "delay", "warning"),
    [
        ("mpl", "student.delay_steps", "the student never moves: its delay of 9 steps is not over"),
        (
            "mpl",
            "teacher.trunk_delay_steps",
            "trunk_delay_steps trains the last layer alone on random weights",
        ),
        ("mpl_roleplay", "teacher.delay_steps", "the first network never moves"),
        ("mpl_roleplay", "student_delay_steps", "a network as student never moves"),
    ],
)
def test_a_network_that_never_moves_is_a_warning(
    recipe: str, delay: str, warning: str, tiny_rec: Path, tmp_path: Path
) -> None:
    options = arguments(tmp_path / "run", tiny_rec, recipe=recipe)
    done = train_here(*options, "--stop-at", "1", f"--algorithm.{delay}", "9")
    assert done.returncode == 0 and f"warning: {warning}" in done.stderr
    roles = "the first network begins as teacher, the second as student; they swap roles every 2"
    assert (roles in done.stdout) == (recipe == "mpl_roleplay")


@pytest.mark.parametrize("recipe", ["uda", "supervised"])
def test_strong_views_that_may_be_gray_are_a_warning(
    recipe: str, tiny_rec: Path, tmp_path: Path
) -> None:
    options = arguments(tmp_path / "run", tiny_rec, recipe=recipe)
    done = train_here(*options, "--stop-at", "1", "--data.translate", "30")
    assert done.returncode == 0
    warning = "at data.magnitude 8 a translation is by 24 pixels (data.translate 30), and data."
    assert (warning in done.stderr) == (recipe == "uda")


@pytest.mark.parametrize(
    ("steps", "momentum", "warned"),
    [(3000, 0.0, True), (4000, 0.0, False), (20, 0.1, False), (100, 0.03, True)],
)
def test_batch_norms_that_are_too_slow_for_a_run_are_a_warning(
    steps: int, momentum: float, warned: bool, tiny_rec: Path, tmp_path: Path
) -> None:
    """Those of wrn_10_1 have a momentum of 0.001, as published."""
    options = arguments(tmp_path / "run", tiny_rec, recipe="supervised")
    options += ["--steps", str(steps), "--model.norm-momentum", str(momentum)]
    done = train_here(*options, "--stop-at", "1")
    assert done.returncode == 0
    assert ("of their initial statistics, with which" in done.stderr) == warned


def test_two_runs_in_one_directory(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpl_fast.training.run_dir.LOCK_SECONDS", 0.2)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another run" in refused(2, *arguments(tmp_path / "run", tiny_rec))


@pytest.mark.slow
def test_an_error_is_printed_once_under_torchrun(tmp_path: Path) -> None:
    """By rank 0, though it occurs on both ranks; torchrun adds a report of its own."""
    failed = run(["--data.root", str(tmp_path), "--run-dir", str(tmp_path), "--seed=-1"], ranks=2)
    assert failed.returncode != 0
    assert failed.stderr.count("train: error: seed must be at least 0") == 1, failed.stderr
    assert failed.stderr.count("train: error:") == 1
    assert "mpl_fast/" not in failed.stderr.replace(f"{TRAIN} FAILED", "")  # no traceback of ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "split", "label"),
    [("label", "labeled", math.nan), ("", "unlabeled", 1000.0)],
)
def test_training_labels_of_no_class(
    index: str, split: str, label: float, tiny_rec: Path, tmp_path: Path
) -> None:
    """Of a file that was replaced by one of the same size: that is all that is checked at start."""
    rec = shutil.copytree(tiny_rec, tmp_path / "rec")
    labeled, every = offsets(rec / "train_label.idx"), offsets(rec / "train.idx")
    relabel(rec / "train.rec", labeled if index else every - labeled, label)
    line = refused(4, *arguments(tmp_path / "run", rec, recipe="uda"), "--log-every", "1")
    assert re.match(
        rf"train: error: {rec}: \d labels of split {split} are not those of classes", line
    )
    assert f"0 to 9: its records are damaged or were replaced; `make_rec.py verify {rec}`" in line
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]


@pytest.mark.slow
def test_a_validation_label_of_no_class(tiny_rec: Path, tmp_path: Path) -> None:
    rec = shutil.copytree(tiny_rec, tmp_path / "rec")
    relabel(rec / "val.rec", {*sorted(offsets(rec / "val.idx"))[:3]}, 77.0)
    line = refused(4, *arguments(tmp_path / "run", rec, recipe="supervised"), "--eval-every", "1")
    assert line.startswith(f"train: error: {rec}: 3 labels of split val are not those of classes")


def offsets(index: Path) -> set[int]:
    """Where records begin."""
    return {int(line.split()[1]) for line in index.read_text().splitlines()}


def relabel(file: Path, records: set[int], label: float) -> None:
    content = bytearray(file.read_bytes())
    for start in records:
        struct.pack_into("<f", content, start + 12, label)
    file.write_bytes(content)
