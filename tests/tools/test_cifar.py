"""The study of CIFAR-10: equal FLOPs, label draws, resuming, tables; and its configs."""

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpl_fast.config import RunConfig
from mpl_fast.config.command_line import as_yaml, parse
from mpl_fast.errors import ConfigError, DataError
from tests.tiny_run import ROOT, write_digits
from tests.tools.test_ablation import Here
from tests.tools.test_damaged_files import SOUND
from tools.studies.ablation import run as ablation_run
from tools.studies.ablation.plan import Job
from tools.studies.ablation.run import Result
from tools.studies.cifar import plan, run
from tools.studies.cifar.__main__ import main
from tools.studies.cifar.plan import BY_NAME, FULL, ROWS, Cell, Row, key_of
from tools.studies.cifar.report import table
from tools.studies.cifar.run import Study

TINY = (
    "labeled_batch=4", "unlabeled_batch=8", "eval_batch=50", "data.image_size=16",
    "data.threads=1",
)  # fmt: skip
ROWS_HERE = (
    Row("supervised", "fast_supervised", TINY, against="supervised"),
    Row("fixmatch", "fast_fixmatch", TINY, against="supervised"),
    Row("finetuned", "fast_finetune", (*TINY, "epochs=0.2"), "fixmatch", after="fixmatch"),
)


class AtOnce:
    """Runs what is submitted in the calling thread, which alone may handle signals."""

    def __init__(self, jobs: int) -> None:
        assert jobs == 1

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a study of digits, whose runs take a step or two in this process."""
    write_digits(tmp_path / "images")
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "test")
    monkeypatch.setattr(
        ablation_run, "subprocess", SimpleNamespace(Popen=Here, PIPE=None, STDOUT=None)
    )
    monkeypatch.setattr(run, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(plan, "ROWS", ROWS_HERE)
    monkeypatch.setattr(plan, "BY_NAME", {row.name: row for row in ROWS_HERE})
    one = Study(tmp_path, tmp_path).flops_of_step(ROWS_HERE[1])
    monkeypatch.setattr(plan, "FULL", 4 * one)
    names = [row.name for row in ROWS_HERE]
    where = ["--src", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--labels", "20"]
    return [*where, "--only", *names, "--compute", "1/2", "--draws", "0", "1"]


@pytest.mark.slow
def test_a_study_trains_what_is_missing(
    study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(study) == 0
    first = capsys.readouterr().out
    assert "[6/6]" in first
    out = tmp_path / "out"
    runs = json.loads((out / "cifar.json").read_text())["runs"]
    assert len(runs) == 6
    by_row: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        by_row.setdefault(found["row"], []).append(found)
    one = Study(tmp_path, tmp_path).flops_of_step(ROWS_HERE[1])
    for found in by_row["fixmatch"]:
        assert found["steps"] == 2 and found["flops"] == 2 * one
        assert found["curve"][-1] == [2 * one, found["top1"]]
    for found in by_row["supervised"]:
        assert found["flops"] == pytest.approx(2 * one, rel=0.2) and found["steps"] > 2
    assert all(found["flops"] > 2 * one for found in by_row["finetuned"])
    drawn = [(out / "records" / f"20_{n}" / "train_label.lst").read_bytes() for n in (0, 1)]
    assert drawn[0] != drawn[1]
    assert (out / "cifar.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "cifar.md").read_text()
    gain = [
        f["top1"] - s["top1"] for f, s in zip(by_row["fixmatch"], by_row["supervised"], strict=True)
    ]
    assert f"[supervised {sum(gain) / 2:+.2f} ± {abs(gain[0] - gain[1]) / 2:.2f}]" in text

    # A run that another continues is trained here even if its result is from elsewhere.
    elsewhere = [found for found in runs if found["row"] == "fixmatch"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "cifar.json").write_text(json.dumps({"runs": elsewhere}))
    again = [*study[:2], "--out", str(tmp_path / "again"), *study[4:]]
    assert main([*again, "--only", "fixmatch", "finetuned", "--draws", "1"]) == 0
    assert "[2/2] finetuned" in capsys.readouterr().out
    rows = [r["row"] for r in json.loads((tmp_path / "again" / "cifar.json").read_text())["runs"]]
    assert sorted(rows) == ["finetuned", "fixmatch", "fixmatch"]

    # A result is kept: of another machine, too, whose runs are not here.
    lost = next(r for r in runs if (r["row"], r["draw"]) == ("supervised", 1))
    stale = lost | {"settings": ["of an earlier version"]}
    kept = [stale, *(found for found in runs if found is not lost)]
    (out / "cifar.json").write_text(json.dumps({"runs": kept}))
    assert main(study) == 0
    second = capsys.readouterr().out
    assert "5 of 6 runs have ended already" in second and "[1/1] supervised" in second
    assert "not used: results of other settings of supervised\n" in second
    final = json.loads((out / "cifar.json").read_text())["runs"]
    assert sorted(final, key=str) == sorted([stale, *runs], key=str)


@pytest.mark.parametrize("text", ["[]", '{"runs": [', '{"runs": null}', '{"runs": [{"row": "a"}]}'])
def test_a_damaged_file_of_results_is_kept(text: str, study: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cifar.json").write_text(text)
    with pytest.raises(DataError, match=r"cifar\.json is damaged or of another version: mend it"):
        main(study)
    assert (tmp_path / "out" / "cifar.json").read_text() == text


@pytest.mark.slow
def test_a_row_does_not_continue_a_run_that_has_not_ended(
    study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*study[:6], "--only", "finetuned", "--compute", "1/2", "--draws", "0"]) == 1
    said = capsys.readouterr().out
    assert "failed: it continues fixmatch, 1/2 of" in said
    assert "give --only fixmatch finetuned" in said


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_the_study(
    study: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(job: Job, *_: object) -> Result:
        return Result(job, None, "ended with exit code 75", stopped=True)

    monkeypatch.setattr(run, "run", stopped)
    with pytest.raises(SystemExit, match="interrupted; the same command continues"):
        main(study)
    assert not (tmp_path / "out" / "cifar.json").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_said(
    study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "supervised").write_text("no folder")
    assert main([*study[:6], "--only", "supervised", "--compute", "1", "--draws", "0"]) == 1
    found = capsys.readouterr().out
    assert "supervised, 1 of" in found and "failed: " in found
    assert json.loads((tmp_path / "out" / "cifar.json").read_text())["runs"] == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compute", "0"], "--compute: must be a share such as 1/4"),
        (["--compute", "much"], "--compute: must be a share such as 1/4, at most 4, not 'much'"),
        (["--compute", "1/0"], "--compute: must be a share"),
        (["--draws", "-1"], "--draws: must be a whole number of at least 0"),
        (["--only", "mpl", "unknown"], "--only: invalid choice: 'unknown'"),
    ],
)
def test_bad_options_are_one_line(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(["--src", str(tmp_path), "--out", str(tmp_path), *more])


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--src .*/none does not exist"):
        main(["--src", str(tmp_path / "none"), "--out", str(tmp_path)])


def test_the_table_pairs_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: Row(name, "fast_mpl", against="a") for name in "ab"}
    monkeypatch.setattr(plan, "ROWS", tuple(rows.values()))
    monkeypatch.setattr(plan, "BY_NAME", rows)
    results = [
        key_of(Cell(rows[row], Fraction(1, 4), 4000, draw))
        | {"top1": top1, "flops": 7, "train_seconds": 9.0}
        for row, draw, top1 in [("a", 0, 50.0), ("a", 1, 60.0), ("b", 1, 61.0), ("b", 2, 80.0)]
    ]
    other = {**results[0], "top1": 0.0}
    text = table([*results, {**other, "settings": ["x"]}, {**other, "config_sha256": "0"}])
    assert "|  | 1/8 | 1/4 | 1/2 | 1 |" in text
    assert "| `a` |  | 55.00 ± 7.07 (2) |  |  | 9 s, 7 |" in text
    assert "| `b` |  | 70.50 ± 13.44 (2) [a +1.00] |  |" in text


def config_of(row: Row) -> RunConfig:
    file = ROOT / "configs" / f"cifar10_4k_{row.config}.yaml"
    start = ["--algorithm.start", "-"] if row.after else []
    return parse(["--config", str(file), "--data.root", "-", "--run-dir", "-", *start])


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_row_has_a_config_of_as_many_flops(row: Row) -> None:
    """supervised is shorter: it learns nothing more from an hour."""
    config = config_of(row)
    assert config.model.name == "airbench94"
    if row.after:
        assert row.after in BY_NAME and config.recipe == "finetune"
    elif not row.settings:
        whole = Study(ROOT, ROOT).flops_of_step(row) * config.steps
        expected = FULL / 6 if row.name == "supervised" else FULL
        assert whole == pytest.approx(expected, rel=0.02)


def test_runs_side_by_side_divide_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was trained with other threads has ended all the same, also one of a version
    without some options."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(Study, "pack", lambda self, cell: tmp_path)
    cell = Cell(BY_NAME["mpl"], Fraction(1, 8), 4000, 0)
    alone, beside = (Study(tmp_path, tmp_path, jobs).job(cell) for jobs in (1, 4))
    assert (alone.config.data.threads, beside.config.data.threads) == (6, 1)
    alone.folder.mkdir(parents=True)
    (alone.folder / "summary.json").write_text(json.dumps(SOUND | {"steps": alone.config.steps}))
    text = as_yaml(alone.config)
    (alone.folder / "config.yaml").write_text(text)
    assert alone.complete and beside.complete
    earlier = text.replace("  strong_crop: shared\n", "").replace("  labeled_view: weak\n", "")
    assert len(earlier) < len(text)
    (alone.folder / "config.yaml").write_text(earlier)
    assert beside.complete
    (alone.folder / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert not beside.complete


def test_schedules_are_scaled_with_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, tmp_path)
    monkeypatch.setattr(study, "pack", lambda cell: tmp_path)
    whole, quarter = (
        study.job(Cell(BY_NAME["mpl"], share, 4000, 3)).config
        for share in (Fraction(1), Fraction(1, 4))
    )
    assert quarter.seed == 3
    for key in ("steps", "eval_every"):
        assert getattr(quarter, key) == pytest.approx(getattr(whole, key) / 4, abs=1)
    a, b = whole.algorithm, quarter.algorithm
    assert b.teacher.warmup == pytest.approx(a.teacher.warmup / 4, abs=1)  # type: ignore[union-attr]
    assert b.consistency.ramp == pytest.approx(a.consistency.ramp / 4, abs=1)  # type: ignore[union-attr]
