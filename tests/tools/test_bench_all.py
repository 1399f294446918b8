"""All benchmarks in one command: it shares its time out, survives its jobs and reports all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import ROOT
from tools.bench import all as bench_all
from tools.bench.__main__ import NAMES
from tools.bench.all import Ended, Job, allowance, command, jobs, page, run
from tools.bench.results import FORM

PRINTS = "import sys; print('| a table |'); sys.exit(int(sys.argv[1]))"
SLEEPS = "import time; print('began', flush=True); time.sleep(600)"


def python(source: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source, *arguments)


def test_the_most_important_comes_first_and_every_benchmark_is_there() -> None:
    found, left_out = jobs(gpu=True, smoke=False, rec="records")
    names = [job.name for job in found]
    assert names[:3] == ["gpu_tests", "step_wrn_28_2", "step_resnet50"]
    assert left_out == []
    for gpu, smoke in ((True, False), (False, False), (False, True)):
        found, _ = jobs(gpu=gpu, smoke=smoke, rec="records")
        benches = {job.command[3] for job in found if job.result}
        assert benches == NAMES.keys() - {"all", "compare", "pack"}
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        found, _ = jobs(gpu=gpu, smoke=True, rec=None)
        steps = next(job for job in found if job.name == "step")
        assert steps.command[4:] == ("--device", device)
    _, left_out = jobs(gpu=False, smoke=False, rec=None)
    assert left_out == ["input: it reads records, which --rec names"]


def test_a_job_is_given_where_to_write_and_how_long_it_may_take() -> None:
    job = Job("x", ("python", "x.py"), 1.0)
    given = command(job, Path("/out"), 80.0, smoke=False, commit="abc")
    assert given[2:] == ["--out", "/out/x.json", "--minutes", "1.000", "--commit", "abc"]
    short = command(job, Path("/out"), 80.0, smoke=True, commit=None)
    assert short[2:] == ["--out", "/out/x.json", "--smoke"]
    tests = Job("gpu_tests", ("pytest",), 1.0, result=False)
    assert command(tests, Path("/out"), 80.0, smoke=False, commit="abc") == ["pytest"]


def test_what_a_job_does_not_use_goes_to_those_behind_it() -> None:
    waiting = [Job(name, (), share) for name, share in (("a", 1.0), ("b", 2.0), ("c", 1.0))]
    assert allowance(waiting, 100.0) == 25.0
    assert allowance(waiting[1:], 99.0) == 66.0  # a took a second
    assert allowance(waiting[2:], 40.0) == 40.0
    left_out: list[str] = []
    turns = bench_all._turns([waiting[0], waiting[2]], time.monotonic() + 25.0, left_out)
    assert [job.name for job, _ in turns] == ["a", "c"]
    late = [waiting[0]._replace(share=0.1), waiting[1]]  # too short a share; the next gets it
    turns = bench_all._turns(late, time.monotonic() + 60.0, left_out)
    assert [job.name for job, _ in turns] == ["b"] and left_out == ["a: no time"]


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The child of the job ignores SIGTERM, and so does the job."""
    source = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "x.log"
    ended = run("x", python(source), log, 8.0)
    assert (ended.code, ended.how) == (None, "ended: its time was over")
    assert 8.0 <= ended.seconds < 300.0  # of the 600 that it would take
    child = int(log.read_text().split()[0])
    for _ in range(600):
        if not _runs(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("its child went on")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_failure_is_reported_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    ended = run("x", python(PRINTS, "3"), log, 300.0)
    assert (ended.code, ended.how) == (3, "failed with code 3")
    assert log.read_text() == "| a table |\n"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """Jobs in place of the benchmarks: one ends well, one has no time, one fails."""
    writes = (
        "import json, sys; from pathlib import Path\n"
        "assert '--smoke' in sys.argv\n"
        "row = dict(name='speed', median=2.0, low=1.0, high=3.0, n=5, unit='ms', better='lower',\n"
        "           steady=False, limit=None, target=None)\n"
        f"found = dict(form={FORM!r}, claim='what it is', rows=[row], machine=dict(cpu='a chip'),\n"
        "             skipped=['no time: another'])\n"
        "Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps(found))\n"
    )
    made = [
        Job("good", python(writes), 100.0),
        Job("late", python(PRINTS, "0"), 0.01),
        Job("bad", python(PRINTS, "1"), 100.0),
    ]
    monkeypatch.setattr(bench_all, "jobs", lambda **_: (made, ["other: it needs a GPU"]))
    return made


def test_it_goes_on_after_failures_and_reports_all(planned: list[Job], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(parents=True)
    (out / "bad.json").write_text('{"claim": "of an earlier run"}')
    assert bench_all.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 1
    text = (out / "summary.md").read_text()
    assert "| good | done |" in text
    assert "| bad | failed with code 1 |" in text
    assert "- late: no time" in text and "- other: it needs a GPU" in text
    assert "| speed | 2 ms (1 to 3) | 5 |" in text
    assert "what it is" in text and "- no time: another" in text and "- cpu: a chip" in text
    assert "| a table |" in text  # the end of the failed one's log
    assert "of an earlier run" not in text
    assert "no number here is a claim" in text


def test_a_page_shows_the_end_of_a_failed_log(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("\n".join(f"line {n}" for n in range(40)))
    (tmp_path / "x.json").write_text("{broken")
    text = page(tmp_path, [Ended("x", 1, 3.4), Ended("y", None, 5.0)], [], smoke=False)
    assert "| y | ended: its time was over | 5 |" in text
    assert "line 39" in text and "line 28" in text and "line 27" not in text
    assert "no number" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--only", "nothing", "--device", "cpu"], "step"),
        (["--rec", "nowhere"], "--rec nowhere has no manifest.json"),
    ],
)
def test_one_line_for_a_wrong_option(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_all.main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_job_and_writes_the_page(tmp_path: Path) -> None:
    source = (
        "import sys\n"
        "from tools.bench import all as bench_all\n"
        f"bench_all.jobs = lambda **_: ([bench_all.Job('x', {python(SLEEPS)!r}, 1.0)], [])\n"
        f"sys.exit(bench_all.main(['--device', 'cpu', '--out', {str(tmp_path)!r}]))\n"
    )
    child = subprocess.Popen(
        python(source), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "x.log"
    for _ in range(3000):
        if (log.exists() and "began" in log.read_text()) or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=300)
    assert child.returncode == 130, error
    assert "- interrupted" in (tmp_path / "summary.md").read_text()
    assert "Traceback" not in error


def test_every_test_that_it_runs_is_there() -> None:
    assert all((ROOT / name).exists() for name in bench_all.TESTS)
