"""All benchmarks in one command: it shares its time out, survives its jobs and reports all."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import ROOT
from tools.bench import all as bench_all
from tools.bench.__main__ import NAMES
from tools.bench.all import Job, command, jobs, page
from tools.bench.jobs import Ended, run
from tools.bench.results import FORM


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_the_most_important_comes_first_and_every_benchmark_is_there() -> None:
    found, left_out = jobs(gpu=True, smoke=False, rec="records")
    names = [job.name for job in found]
    assert names[:2] == ["step_wrn_28_2", "step_resnet50"]
    assert left_out == []
    for gpu, smoke in ((True, False), (False, False), (False, True), (True, True)):
        found, _ = jobs(gpu=gpu, smoke=smoke, rec="records")
        benches = {job.module[1] for job in found}
        assert benches == NAMES.keys() - {"all", "compare", "pack", "plan"}
        if smoke:
            device = "cuda" if gpu else "cpu"
            assert found[0].module == ("tools.bench", "step", "--device", device)
    _, left_out = jobs(gpu=False, smoke=False, rec=None)
    assert left_out == ["input: it reads records, which --rec names"]


def test_a_job_is_given_where_to_write_and_how_long_it_may_take() -> None:
    job = Job("x", ("tools.bench", "step"), 1.0)
    whole = argparse.Namespace(out=Path("/out"), smoke=False, commit="abc")
    given = command(job, 80.0, whole)
    assert given[1:4] == ["-m", "tools.bench", "step"]
    assert given[4:] == ["--out", "/out/x.json", "--minutes", "1.000", "--commit", "abc"]
    short = argparse.Namespace(out=Path("/out"), smoke=True, commit=None)
    assert command(job, 80.0, short)[4:] == ["--out", "/out/x.json", "--smoke"]


def test_what_a_job_does_not_use_goes_to_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    waiting = [Job(*x) for x in (("a", (), 1.0), ("b", (), 2.0), ("late", (), 0.1), ("c", (), 1.0))]
    left_out: list[str] = []
    limits = {}
    for job, limit in bench_all._turns(waiting, 82.0, left_out):
        limits[job.name] = limit
        now[0] += 1.0  # a second of it is used
    assert limits == pytest.approx({"a": 20.0, "b": 81.0 * 2 / 3.1, "c": 80.0})
    assert left_out == ["late: no time"]


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The child of the job ignores SIGTERM, and so does the job."""
    ignoring = ["sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait"]
    ended = run("x", ignoring, tmp_path, 4.0, grace=0.5)
    assert (ended.code, ended.how) == (-signal.SIGKILL, "ended: its time was over")
    assert 4.0 <= ended.seconds < 300.0  # of the 600 that it would take
    child = int((tmp_path / "x.log").read_text().split()[0])
    for _ in range(3000):
        if not runs(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("its child went on")


def test_a_signal_while_a_job_is_started_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[subprocess.Popen[bytes]]()
    popen = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr("tools.bench.jobs.subprocess.Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("x", ["sleep", "600"], tmp_path, 1000.0)
    assert started[0].returncode == -signal.SIGTERM  # which is not blocked in it


def test_a_second_signal_does_not_keep_a_job_from_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers repeat SIGTERM, and impatient people Ctrl-C, while the job has its grace. Any
    thread may take the signal, such as one that a library has started."""
    sent, kill = list[tuple[int, int]](), os.killpg

    def stop() -> None:
        other = threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,))
        other.start()
        other.join()

    def interrupted(group: int, number: int) -> None:
        if not sent:
            stop()
        sent.append((group, number))
        kill(group, number)

    monkeypatch.setattr("tools.bench.jobs.os.killpg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("x", ["sh", "-c", "trap '' TERM; sleep 600 & wait"], tmp_path, 1.0, grace=0.5)
    group = sent[0][0]
    assert sent == [(group, signal.SIGTERM), (group, signal.SIGKILL)]


def test_a_job_that_cannot_be_ended_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a driver's call that never returns."""
    sent, kill = list[int](), os.killpg
    monkeypatch.setattr("tools.bench.jobs.os.killpg", lambda group, number: sent.append(group))
    ended = run("x", ["sleep", "600"], tmp_path, 0.1, grace=0.1)
    kill(sent[0], signal.SIGKILL)
    assert (ended.code, ended.in_time) == (-signal.SIGKILL, False)


@pytest.mark.parametrize("command", ["", "nohup "])
def test_a_closed_terminal_interrupts_unless_nohup_ignores_it(command: str) -> None:
    source = (
        "import os, signal; from tools.bench.jobs import interrupt_on_signals\n"
        "interrupt_on_signals()\n"
        "try: os.kill(os.getpid(), signal.SIGHUP)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    # The tests, too, may run under nohup.
    closed = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    shell = ["sh", "-c", f'{command}"$@" 2>/dev/null', "sh", *python(source)]
    done = subprocess.run(
        python(f"{closed}os.execvp('sh', {shell})"), cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == (b"" if command else b"interrupted\n")


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_goes_on_after_failures_and_reports_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job ends well, one has no time, one fails and writes nothing."""
    out = tmp_path / "out"
    writes = (
        "import json, sys; from pathlib import Path\n"
        "row = dict(name='speed', median=2.0, low=1.0, high=3.0, n=5, unit='ms', better='lower',\n"
        "           steady=False, limit=None, target=None)\n"
        f"found = dict(form={FORM!r}, claim='what it is', rows=[row], machine=dict(cpu='a chip'),\n"
        "             skipped=['no time: another'])\n"
        f"Path({str(out)!r}, 'good.json').write_text(json.dumps(found))\n"
    )
    sources = {"good": writes, "bad": "print('| a table |'); raise SystemExit(3)"}
    made = [Job("good", (), 100.0), Job("late", (), 0.01), Job("bad", (), 100.0)]
    monkeypatch.setattr(bench_all, "jobs", lambda **_: (made, ["other: it needs a GPU"]))
    monkeypatch.setattr(bench_all, "command", lambda job, *_: python(sources[job.name]))
    out.mkdir(parents=True)
    (out / "bad.json").write_text('{"claim": "of an earlier run"}')
    assert bench_all.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 1
    assert (out / "bad.log").read_text() == "| a table |\n"
    text = (out / "summary.md").read_text()
    assert "| good | done |" in text
    assert "| bad | failed with code 3 |" in text
    assert "- late: no time" in text and "- other: it needs a GPU" in text
    assert "| speed | 2 ms (1 to 3) | 5 |" in text
    assert "what it is" in text and "- no time: another" in text and "- cpu: a chip" in text
    assert "| a table |" in text  # the end of the failed one's log
    assert "of an earlier run" not in text
    assert "no number here is a claim" in text


def test_a_page_shows_the_end_of_a_failed_log(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("\n".join(f"line {n}" for n in range(40)))
    (tmp_path / "x.json").write_text("{broken")
    text = page(
        tmp_path, [Ended("x", 1, 3.4), Ended("y", -15, 5.0, in_time=False)], [], smoke=False
    )
    assert "| y | ended: its time was over | 5 |" in text
    assert "line 39" in text and "line 28" in text and "line 27" not in text
    assert "no number" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--only", "nothing", "--device", "cpu"], "step"),
        (["--rec", "nowhere"], "--rec nowhere has no manifest.json"),
        pytest.param(
            ["--device", "cuda"],
            "finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
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
        "bench_all.jobs = lambda **_: ([bench_all.Job('x', (), 1.0)], [])\n"
        "bench_all.command = lambda *_: ['sh', '-c', 'echo began; sleep 600']\n"
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
