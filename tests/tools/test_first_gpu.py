"""The first minutes on a GPU: what is run, that it stops in time and goes on, what it reports."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpl_fast.errors import PREEMPTED, UserError
from tests.tiny_run import ROOT
from tests.tools.test_bench_all import runs
from tools.bench.jobs import Ended
from tools.bench.results import FORM
from tools.first_gpu import __main__ as first_gpu
from tools.first_gpu import plan, summary
from tools.first_gpu.plan import ENDLESS, Step
from tools.first_gpu.summary import Outcome, Summary

MACHINE = {"gpu": "a chip", "driver": "1.2", "versions": {}, "missing": ["timm"]}
FIND_MACHINE = first_gpu._machine
LONG = 1000.0  # seconds, in which true and false end on any machine


def shell(name: str, command: str, limit: float = LONG, *, again: bool = False) -> Step:
    return Step(name, lambda seconds: ["sh", "-c", command], limit, again=again)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gpu, "_machine", lambda _: json.dumps(MACHINE))
    monkeypatch.setattr(first_gpu, "GRACE", 0.5)
    monkeypatch.setattr(first_gpu, "SHORTEST", 1.0)


def call(out: Path, steps: list[Step], patch: pytest.MonkeyPatch, *options: str) -> int:
    """A call of the script with these steps."""
    patch.setattr(plan, "steps", lambda _: (steps, ["other: it needs records"]))
    return first_gpu.main(["--minutes", "600", "--out", str(out), *options])


def statuses(out: Path) -> dict[str, str]:
    found = json.loads((out / "summary.json").read_text())
    return {step["name"]: step["status"] for step in found["steps"]}


def test_it_goes_on_after_a_failure_and_a_step_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that hangs ignores SIGTERM."""
    hangs = shell("hangs", "trap '' TERM; echo $$; exec sleep 600", 2.0)
    steps = [shell("bad", "echo why; false"), hangs, shell("good", "echo well")]
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    assert call(out, steps, monkeypatch, "--archive", str(archive)) == 1
    assert statuses(out) == {"bad": "failed", "hangs": "timed out", "good": "passed"}
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "2 of 3 steps did not pass: bad, hangs; see" in printed.err
    assert "missing, so that steps will fail: timm" in printed.out
    pid = (out / "hangs.log").read_text().strip()
    assert not pid or not runs(int(pid))
    page = (out / "summary.md").read_text()
    assert "| bad | **failed**, code 1 |" in page and "| good | passed |" in page
    assert "The end of bad.log:\n\n```\nwhy\n```" in page
    assert "- other: it needs records" in page and "- gpu: a chip" in page
    with tarfile.open(archive) as tar:
        names = {"bad.log", "hangs.log", "good.log", "env.json", "summary.json", "summary.md"}
        assert set(tar.getnames()) == names


def test_the_next_call_runs_what_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = tmp_path / "out", tmp_path / "ran"

    def steps(second: str) -> list[Step]:
        lines = {"a": "true", "b": second, "train": "true"}
        return [
            shell(name, f"echo {name} >> {ran}; {end}", again=name == "train")
            for name, end in lines.items()
        ]

    assert call(out, steps("false"), monkeypatch) == 1
    assert call(out, steps("true"), monkeypatch) == 0
    assert ran.read_text().split() == ["a", "b", "train", "b", "train"]
    assert set(statuses(out).values()) == {"passed"}
    assert call(out, steps("true")[2:], monkeypatch) == 0
    assert [*statuses(out)] == ["a", "b", "train"]  # what is not in a call is kept


def test_each_step_has_at_most_its_time_and_what_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 minutes, less the margin and the time to end a step; 100 s are kept for `train`."""
    all_of_it, now, given = 36_000.0 - first_gpu.MARGIN, [0.0], dict[str, float]()

    def run(name: str, command: object, out: Path, limit: float, grace: float) -> Ended:
        given[name] = limit
        now[0] += {"short": 10.0, "long": 35_800.0, "longer": 35_894.0}.get(name, 0.0)
        return Ended(name, 0, 1.0)

    monkeypatch.setattr(first_gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(first_gpu, "run", run)
    steps = [shell("short", "", 50.0), shell("long", "", 1e6), shell("late", "", 1e6)]
    steps += [shell("train", "", ENDLESS)._replace(kept=100.0)]
    assert call(tmp_path, steps, monkeypatch) == 0
    assert given == pytest.approx(
        {
            "short": 50.0,
            "long": all_of_it - 0.5 - 100.0 - 10.0,
            "late": all_of_it - 0.5 - 100.0 - 35_810.0,
            "train": all_of_it - 0.5 - 35_810.0,
        }
    )
    now[0], out = 0.0, tmp_path / "other"
    assert call(out, [shell("longer", "", 1e6), *steps[2:]], monkeypatch) == 0
    assert statuses(out) == {"longer": "passed", "late": "not reached", "train": "passed"}
    assert "| late | **not reached** |" in (out / "summary.md").read_text()


@pytest.mark.parametrize(
    ("step", "ended", "status"),
    [
        (shell("train", "", ENDLESS), Ended("train", PREEMPTED, 9.0, in_time=False), "passed"),
        (shell("train", "", ENDLESS), Ended("train", -9, 9.0, in_time=False), "timed out"),
        (shell("train", "", ENDLESS), Ended("train", 5, 9.0), "failed"),
        (shell("evaluate", ""), Ended("evaluate", 0, 9.0, in_time=False), "timed out"),
        (shell("evaluate", ""), Ended("evaluate", PREEMPTED, 9.0), "failed"),
    ],
)
def test_training_is_stopped_and_others_must_end(step: Step, ended: Ended, status: str) -> None:
    assert first_gpu.status_of(step, ended, ()) == status


def test_tests_that_were_all_skipped_have_not_passed() -> None:
    step, ended = shell("test_x", ""), Ended("test_x", 0, 9.0)
    assert first_gpu.status_of(step, ended, ("3 skipped in 2.00s",)) == "failed"
    assert first_gpu.status_of(step, ended, ("1 passed, 3 skipped in 2.00s",)) == "passed"
    assert first_gpu.status_of(step, ended, ()) == "failed"


def test_a_sigterm_ends_the_step_and_leaves_a_true_summary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = (
        "import runpy, sys\n"
        "from tools.first_gpu import plan\n"
        "def shell(name, line):\n"
        "    return plan.Step(name, lambda seconds: ['sh', '-c', line], 1000.0)\n"
        "steps = [shell('a', 'true'), shell('b', 'echo $$; sleep 600'), shell('c', 'true')]\n"
        "plan.steps = lambda _: (steps, [])\n"
    )
    # In place of the check for a GPU.
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(MACHINE)}'\n")
    python.chmod(0o755)
    source += f"sys.executable = {str(python)!r}\n"
    source += f"sys.argv = ['', '--minutes', '600', '--out', {str(out)!r}]\n"
    source += "runpy.run_module('tools.first_gpu', run_name='__main__')\n"
    child = subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = out / "b.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert child.poll() is None, child.communicate()
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=600)
    assert child.returncode == 130
    assert error.decode().startswith("first_gpu_run: interrupted; see ")
    assert error.count(b"\n") == 1
    assert statuses(out) == {"a": "passed", "b": "interrupted", "c": "not reached"}
    assert not runs(int(log.read_text()))


def test_what_ran_when_a_call_was_killed_is_interrupted(tmp_path: Path) -> None:
    Summary(tmp_path, ["a", "b"], []).set(Outcome("a", summary.RUNNING, limit=9.0))
    assert statuses(tmp_path) == {"a": "running", "b": "not reached"}
    assert Summary(tmp_path, ["a", "b"], []).outcomes["a"].status == "interrupted"


def test_key_numbers_of_a_benchmark_of_tests_and_of_training(tmp_path: Path) -> None:
    row = {"median": 2.0, "low": 1.0, "high": 3.0, "n": 5, "better": "lower", "target": None}
    rows = [row | {"name": f"step {n}", "unit": "ms"} for n in range(20)]
    rows += [row | {"name": "ratio", "unit": "x"}, row | {"name": "another", "unit": "times"}]
    rows += [row | {"name": "aim", "unit": "ms", "target": 1.0, "met": False}]
    found = {"form": FORM, "claim": "what it is", "rows": rows, "failed": {"one": "off by 3"}}
    (tmp_path / "bench_step.json").write_text(json.dumps(found))
    (tmp_path / "bench_step.log").write_text("FAILED: one: off by 3\n")
    (tmp_path / "test_x.log").write_text(
        "FAILED tests/x.py::test_a - assert 1 == 2\n=== 1 failed, 3 passed in 2.00s ===\n"
    )
    (tmp_path / "train").mkdir()
    made = [
        {"step": 50, "images_per_second": 10.0, "data_wait": 0.5},
        {"step": 100, "images_per_second": 900.0, "data_wait": 0.01},
        {"step": 100, "eval/top1": 31.25},
    ]
    (tmp_path / "train/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    written = Summary(tmp_path, ["bench_step", "test_x", "train"], [])
    for name in written.outcomes:
        results = summary.found_by(name, tmp_path)
        written.set(Outcome(name, "failed", 1, 9.0, 9.0, results))
    page = (tmp_path / "summary.md").read_text()
    names = [line.split(" | ")[0] for line in page.splitlines() if line.startswith(("| s", "| r"))]
    assert "| aim | 2 ms (1 to 3) | 5 |  | ≤ 1: **missed** |\n| ratio | 2 x" in page
    assert "| another | 2 times" in page
    assert "| step 8 |" in page and "| step 9 |" not in page, names
    assert "- FAILED: one: off by 3" in page
    assert "1 failed, 3 passed in 2.00s<br>FAILED tests/x.py::test_a - assert 1 == 2" in page
    assert "2 rows up to step 100<br>images/s: 900 (900 to 900)" in page
    assert "top-1 31.25 % at step 100" in page


TESTS = """
import pathlib, time

def test_fails_for_a_reason_that_its_line_has_room_for():
    assert 1 == 2

def test_takes_long():
    pathlib.Path(__file__).with_name("began").touch()
    time.sleep(600)
"""


def test_of_tests_that_took_too_long_the_failures_are_known(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(TESTS)
    steps, _ = plan.steps(options("--only", "test_rng"))
    *command, _ = steps[0].command(LONG)
    command += ["-m", "", "-p", "tests.conftest", str(file)]
    with (tmp_path / "test_x.log").open("w") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not (tmp_path / "began").exists():
            assert child.poll() is None
        child.terminate()
        child.wait(timeout=600)
    total, failed = summary.found_by("test_x", tmp_path)
    assert total.startswith("1 failed in ")
    assert failed.startswith("FAILED ") and failed.endswith(" - assert 1 == 2")


def options(*given: str) -> argparse.Namespace:
    return first_gpu.options_of(["--out", "runs/x", *given])


def test_all_gpu_tests_come_first_then_benchmarks_then_training(tmp_path: Path) -> None:
    steps, left_out = plan.steps(options("--minutes", "10"))
    names = [step.name for step in steps]
    assert len({*names}) == len(names)
    assert all((ROOT / file).exists() for file in plan.TESTS)
    tests = [name for name in names if name.startswith("test_")]
    assert "test_rng" in tests  # which is not in the table
    assert names[: len(tests)] == tests
    assert names[len(tests) : len(tests) + 2] == ["bench_step_wrn_28_2", "bench_step_resnet50"]
    assert [step.kept for step in steps[len(tests) :]][:2] == [90.0, 0.0]
    assert left_out[0] == "bench_input: it reads records, which --photographs names"
    assert left_out[1].startswith("train: it needs CIFAR-10")
    cifar = tmp_path / "cifar.tar.xz"
    cifar.touch()
    with_records, left_out = plan.steps(options("--minutes", "10", "--cifar", str(cifar)))
    added = [step for step in with_records if step.name not in names]
    assert [step.name for step in added] == ["pack", "bench_input_cifar", "train", "evaluate"]
    assert len(left_out) == 1
    assert [step.kept for step in added] == [90.0, 0.0, 120.0, 40.0]
    given = next(step for step in steps if step.name == "bench_losses").command(80.0)
    assert given[1:4] == ["-m", "tools.bench", "losses"] and given[-2:] == ["--minutes", "1.000"]
    chosen, _ = plan.steps(options("--only", "bench_", "--skip", "bench_step", "bench_losses"))
    assert all(s.name.startswith("bench_") and "step" not in s.name for s in chosen)


@pytest.mark.slow
def test_every_file_with_tests_for_a_gpu_is_a_step_and_no_other() -> None:
    """As pytest finds them: a step without one would fail, and tests without a step never run."""
    collect = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run([*collect, "tests"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    steps, _ = plan.steps(options("--only", "test_"))
    assert {next(a for a in s.command(1.0) if a.endswith(".py")) for s in steps} == files


def test_a_word_that_fits_nothing_is_an_error_and_steps_of_other_calls_are_none() -> None:
    with pytest.raises(UserError, match=r"--skip bench_stp: there are test_loader, .* evaluate$"):
        plan.steps(options("--only", "test_", "--skip", "bench_stp"))
    assert plan.steps(options("--only", "test_", "--skip", "pack", "train"))
    with pytest.raises(UserError, match="nothing to run is left: there are test_loader, "):
        plan.steps(options("--only", "test_", "--skip", "test_"))


def test_what_passed_elsewhere_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for commit, names in {"1234": "ab", "5678": "abc"}.items():
        machine = json.dumps(MACHINE | {"commit": commit})
        monkeypatch.setattr(first_gpu, "_machine", lambda _, found=machine: found)
        assert call(tmp_path, [shell(name, "true") for name in names], monkeypatch) == 0
    assert "a: passed before, on a chip, commit 1234\n" in capsys.readouterr().out
    page = (tmp_path / "summary.md").read_text().splitlines()
    words = {name: line for line in page for name in "abc" if line.startswith(f"| {name} |")}
    assert words["a"].endswith("| on a chip, commit 1234 |") and "commit" not in words["c"]


def test_no_time_for_anything_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gpu, "SHORTEST", 1e9)
    with pytest.raises(UserError, match="--minutes 600: too short for any of 1 steps"):
        call(tmp_path, [shell("a", "true")], monkeypatch)
    assert statuses(tmp_path) == {"a": "not reached"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--minutes", "0"], "--minutes 0: take more than 0"),
        (["--only", "nothing"], "there are test_loader, "),
        (["--rec", "nowhere"], "has no manifest.json"),
        (["--cifar", "nowhere"], "does not exist"),
    ],
)
def test_one_line_for_a_wrong_option(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=words) as error:
        first_gpu.main(given)
    assert "\n" not in str(error.value)


def test_a_folder_without_wheels_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "tools" / "first_gpu_run.sh"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"WHEELS={tmp_path} has neither *.whl nor part00" in done.stderr


def test_an_interpreter_without_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n"
    )
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setattr(first_gpu, "_machine", FIND_MACHINE)
    words = f"No module named 'torch' in {bare}: PYTHON=.* chooses another"
    with pytest.raises(UserError, match=words):
        first_gpu.main(["--out", str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    """From a folder that has other code of the same name."""
    decoy = tmp_path / "tools" / "first_gpu" / "plan.py"
    decoy.parent.mkdir(parents=True)
    decoy.with_name("__main__.py").write_text("raise SystemExit('another program')")
    decoy.write_text("raise SystemExit('another program')")
    done = subprocess.run(
        [str(ROOT / "tools" / "first_gpu_run.sh"), "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "finds no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
