"""The ablation: trains, resumes, compares, and reports failed runs."""

import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mpl_fast.config.command_line import as_yaml
from mpl_fast.errors import ConfigError
from tests.tiny_run import ROOT, TRAIN, arguments, environment, rows, train_here
from tools.studies.ablation import run
from tools.studies.ablation.__main__ import main
from tools.studies.ablation.picture import curve, title
from tools.studies.ablation.plan import Variant, jobs
from tools.studies.ablation.report import summarize, table

STEPS = 12
FAST = ("recipe=supervised",)
SLOW = ("recipe=supervised", "algorithm.learner.lr=0.005")
VARIANTS = ["--variant", "fast", *FAST, "--variant", "slow", *SLOW, "against=fast"]
BOTH = ["--seeds", "3", "5", *VARIANTS]


class Here:
    """A process of train.py within this one."""

    def __init__(self, command: list[str], **_: object) -> None:
        done = train_here(*command[command.index(str(TRAIN)) + 1 :])
        self.stdout, self._code = io.StringIO(done.stderr + done.stdout), done.returncode

    def wait(self) -> int:
        return self._code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains without further processes."""
    popen = SimpleNamespace(Popen=Here, PIPE=None, STDOUT=None)
    monkeypatch.setattr(run, "subprocess", popen)


def options(out: Path, rec: Path, *more: str) -> list[str]:
    config = arguments(out / "unused", rec)[1]
    line = ["--rec", str(rec), "--out", str(out), "--config", config]
    return [*line, "--steps", str(STEPS), *more]


def started(out: Path, rec: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.studies.ablation", *options(out, rec, *more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=ROOT
    )


@pytest.fixture(scope="module")
def killed_and_finished(
    tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """Two variants, two seeds; killed outright in the third run, then run again."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    config = Path(arguments(out / "unused", tiny_rec)[1])
    variants = (Variant("fast", FAST), Variant("slow", SLOW, "fast"))
    planned = jobs(variants, [3, 5], config, tiny_rec, out, STEPS)
    for job in (planned[0], planned[1], planned[3]):  # which an ablation finds complete
        assert train_here(*job.arguments).returncode == 0
    first = started(out, tiny_rec, *BOTH)
    deadline = time.monotonic() + 1800
    while not list((out / "fast" / "seed5" / "checkpoints").glob("step_*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    before = first.communicate()[0]
    again = started(out, tiny_rec, *BOTH)
    after, problems = again.communicate(timeout=1800)
    assert again.returncode == 0, problems
    return out, before, after


def summaries(out: Path, variant: str) -> list[dict[str, Any]]:
    return [json.loads((out / variant / f"seed{s}" / "summary.json").read_text()) for s in (3, 5)]


@pytest.mark.slow
def test_a_killed_ablation_goes_on(killed_and_finished: tuple[Path, str, str]) -> None:
    out, before, after = killed_and_finished
    assert "[3/4] fast, seed 5: training" in before and "[3/4] fast, seed 5: top-1" not in before
    for complete in ("[1/4] fast, seed 3", "[2/4] slow, seed 3", "[4/4] slow, seed 5"):
        assert f"{complete}: complete already" in after
    assert "resuming after step" in after.split("[3/4] fast, seed 5: training")[1]
    steps = [r["step"] for r in rows(out / "fast" / "seed5") if "eval/top1" in r]
    assert steps == [4, 8, 12]


@pytest.mark.slow
def test_the_table_is_that_of_the_runs(killed_and_finished: tuple[Path, str, str]) -> None:
    out, _, printed = killed_and_finished
    found = {
        row["variant"]: row for row in json.loads((out / "ablation.json").read_text())["variants"]
    }
    text = (out / "ablation.md").read_text()
    assert list(found) == ["fast", "slow"]
    top1 = {}
    for variant, row in found.items():
        runs = [rows(out / variant / f"seed{s}") for s in (3, 5)]
        a, b = top1[variant] = [
            r["eval/top1"] for run in runs for r in run if r["step"] == STEPS and "eval/top1" in r
        ]
        assert row["top1"] == pytest.approx((a + b) / 2)
        assert row["top1_sd"] == pytest.approx(abs(a - b) / math.sqrt(2))
        seconds = [sum(r.get("train_seconds", 0.0) for r in run) for run in runs]
        assert row["train_seconds"] == pytest.approx(sum(seconds) / 2)
        rates = [STEPS * 4 / s for s in seconds]
        assert row["images_per_second"] == pytest.approx(sum(rates) / 2)
        assert [run["top1"] for run in row["runs"]] == [a, b]
        assert [s["top1"] for s in summaries(out, variant)] == [a, b]
        assert f"| {variant} | {(a + b) / 2:.2f} ± {abs(a - b) / math.sqrt(2):.2f} |" in text
    gains = [b - a for a, b in zip(top1["fast"], top1["slow"], strict=True)]
    row = found["slow"]
    assert row["gain"] == pytest.approx(sum(gains) / 2) and row["pairs"] == 2
    error = abs(gains[0] - gains[1]) / 2  # sd / sqrt(2) of two numbers
    assert row["gain_se"] == pytest.approx(error)
    assert f"| {sum(gains) / 2:+.2f} ± {error:.2f} |" in text
    assert f"- `slow` against `fast`: {sum(gains) / 2:+.2f} ± {error:.2f}\n" in text
    assert row["besides"] == {k: row[k] for k in ("gain", "gain_se", "pairs")} | {"against": "fast"}
    assert text.split("\n\n", 1)[1].strip() in printed
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*writing*"))


def test_another_recipe_takes_what_it_knows_of_the_config(tmp_path: Path) -> None:
    config = Path(arguments(tmp_path / "unused", tmp_path)[1])
    planned = jobs((Variant("f", FAST), Variant("s", SLOW)), [3], config, tmp_path, tmp_path, STEPS)
    fast, slow = (yaml.safe_load(as_yaml(job.config)) for job in planned)
    mpl = yaml.safe_load(config.read_text())
    teacher, student = mpl["algorithm"]["teacher"], mpl["algorithm"]["student"]
    assert mpl["recipe"] == "mpl" and fast["recipe"] == slow["recipe"] == "supervised"
    learner = fast["algorithm"]["learner"]
    assert {key: learner[key] for key in teacher} == teacher | {"ema": student["ema"]}
    assert fast["algorithm"].keys() == {"learner", "label_smoothing", "mixup"}
    assert slow["algorithm"] == fast["algorithm"] | {"learner": learner | {"lr": 0.005}}
    assert {key: fast["data"][key] for key in mpl["data"]} == mpl["data"]
    assert (fast["seed"], fast["steps"], fast["labeled_batch"]) == (3, STEPS, 4)


@pytest.mark.slow
def test_run_again_it_trains_nothing_and_a_failed_run_has_its_reason_in_its_row(
    here: None,
    killed_and_finished: tuple[Path, str, str],
    tiny_rec: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = killed_and_finished[0]
    files = {f: f.stat().st_mtime_ns for f in out.glob("*/seed*/*") if f.is_file()}
    table = (out / "ablation.json").read_text()
    assert main(options(out, tiny_rec, *BOTH)) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete already") == 4 and ": training\n" not in printed
    assert (out / "ablation.json").read_text() == table
    assert {f: f.stat().st_mtime_ns for f in out.glob("*/seed*/*") if f.is_file()} == files

    failing = ["--seeds", "3", "--variant", "greedy", "labeled_batch=1000", *VARIANTS]
    assert main(options(out, tiny_rec, *failing)) == 1
    assert "[1/3] greedy, seed 3: failed: " in capsys.readouterr().out
    greedy, fast, _ = json.loads((out / "ablation.json").read_text())["variants"]
    reason = greedy["runs"][0]["failed"]
    assert "labeled_batch 1000 is larger than the 20 labeled images" in reason
    assert reason in (out / "ablation.md").read_text()
    assert greedy["top1"] is None and fast["top1"] == summaries(out, "fast")[0]["top1"]
    assert fast["gain"] is None and fast["pairs"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variant", "typo", "algorithm.feedbak=off"], "variant typo: unknown option"),
        (["--variant", "a/b"], "variant 'a/b' cannot be the name of a folder"),
        (["--variant", "a", "--variant", "a"], "variant a is named twice"),
        (["--variant", "a", "steps"], "variant a: 'steps' is not KEY=VALUE"),
        (["--variant", "a", "against=b"], "variant a: there is no variant 'b'"),
        (["--variant", "a", "recipe=mpll"], "variant a: recipe 'mpll' does not exist"),
        (["--variant", "a", "seed=4"], "variant a: seed is set by --seeds"),
        (["--variant", "a", "run-dir=b"], "variant a: run-dir is set by --out"),
        (["--variant", "a", "run_dir=b"], "variant a: run_dir is set by --out"),
        (["--variant", "a", "data.root=b"], "variant a: data.root is set by --rec"),
        (["--variant", "a", "config=b"], "variant a: config is set by --config"),
        (["--variant", "a", "steps=5"], "variant a: steps is set by --steps"),
    ],
)
def test_a_wrong_variant_is_refused_before_anything_runs(
    more: list[str], message: str, tiny_rec: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        main(options(tmp_path / "out", tiny_rec, "--seeds", "0", *more))
    assert not list((tmp_path / "out").glob("*/seed*"))


def test_another_run_in_a_folder_is_refused_before_a_result_is_written(
    tiny_rec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = Path(arguments(out / "unused", tiny_rec)[1])
    (job,) = jobs((Variant("slow", FAST),), [3], config, tiny_rec, out, STEPS)
    (job.folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    (job.folder / "config.yaml").write_text(as_yaml(job.config))
    (out / "ablation.md").write_text("of old")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    message = r"variant slow: .*/slow/seed3 holds another run: .*\.lr was 0\.05 and is 0\.005"
    with pytest.raises(ConfigError, match=message):
        main(options(out, tiny_rec, "--seeds", "3", "--variant", "slow", *SLOW))
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_the_titles_of_one_seed_promise_no_spread(tmp_path: Path) -> None:
    assert title(1) == "one seed"
    assert title(3) == "mean of 3 seeds; bands are ± one standard deviation"
    one, three = (table(summarize([Variant("a", ())], []), n).partition("\n")[0] for n in (1, 3))
    assert "one seed; " in one and "±" not in one and "standard" not in one
    assert "mean ± standard deviation over 3 seeds" in three and "standard error" in three


def test_variants_may_differ_in_steps_where_the_command_does_not_say(tmp_path: Path) -> None:
    config = Path(arguments(tmp_path / "unused", tmp_path)[1])
    longer = Variant("longer", ("steps=9",))
    (job,) = jobs((longer,), [0], config, tmp_path, tmp_path, 0)
    assert job.config.steps == 9
    with pytest.raises(ConfigError, match=r"^variant longer: steps is set by --steps$"):
        jobs((longer,), [0], config, tmp_path, tmp_path, 12)


def test_missing_records_are_reported_once_and_before_anything_runs(tmp_path: Path) -> None:
    done = started(tmp_path / "out", tmp_path / "nope", *BOTH)
    out, problems = done.communicate(timeout=600)
    assert done.returncode == 4 and out == ""
    expected = f"ablation: error: {tmp_path / 'nope'}: no such folder of records"
    assert problems.startswith(expected) and problems.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/"))


def test_what_a_run_warns_of_is_shown_once_and_noted(
    here: None, tiny_rec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without those of an older, shorter run in the same log."""
    idle = ["--variant", "idle", "recipe=supervised", "algorithm.learner.delay_steps=2"]
    line = options(tmp_path / "out", tiny_rec, "--steps", "2", "--seeds", "3", "5", *idle)
    log = tmp_path / "out" / "logs" / "idle_seed3.log"
    log.parent.mkdir(parents=True)
    log.write_text("warning: the learner never moves: of old\nstep 1/")
    assert main(line) == 0
    warning = "the learner never moves: its delay of 2 steps is not over in a run of 2"
    shown = [text for text in capsys.readouterr().out.splitlines() if "warning: " in text]
    assert shown == [f"  idle, seed 3: warning: {warning}"]
    assert all(f"\nwarning: {warning}\n" in f.read_text() for f in log.parent.iterdir())
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert [text for text in table.splitlines() if "never moves" in text] == [
        f"- `idle`: {warning}"
    ]
    assert main(line) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    assert (tmp_path / "out" / "ablation.md").read_text() == table


def test_seconds_of_an_evaluation_between_two_rows(tmp_path: Path) -> None:
    """Rows at steps 4 and 10 took 2 s and 6 s; evaluations at 4, 7 and 10."""
    lines: list[dict[str, float]] = [
        {"step": 4, "seconds": 2.0},  # the name before train_seconds: still read
        {"step": 4, "eval/top1": 10.0},
        {"step": 7, "eval/top1": 20.0},
        {"step": 10, "train_seconds": 6.0},
        {"step": 10, "eval/top1": 30.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(tmp_path) == {4: (2.0, 10.0), 7: (5.0, 20.0), 10: (8.0, 30.0)}
