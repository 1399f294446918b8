"""What status.json says of a run, and the table of many."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import run_command
from mpl_fast.training import status
from mpl_fast.training.status import Status, read, table
from tests.tiny_run import run_here
from tools.status import main


def a_run(folder: Path, **values: Any) -> Path:
    """A run directory whose status.json has some values besides those of a run at step 40."""
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "config.yaml").write_text("recipe: uda\nsteps: 100\n")
    (folder / "metrics.jsonl").write_text(
        '{"step": 30, "images_per_second": 25.0}\n{"step": 30, "eval/top1": 50.0}\n'
    )
    usual = {"state": "running", "step": 40, "steps": 100, "time": time.time()}
    usual |= {"images_per_second": 123.4, "eta_seconds": 754.0, "top1": 61.5}
    if values:
        (folder / "status.json").write_text(json.dumps(usual | values))
    return folder


def test_the_table(tmp_path: Path) -> None:
    """A lock is held as long as a run's process lives."""
    long_ago = time.time() - 3600
    running = a_run(tmp_path / "a running", state="running")
    silent = a_run(tmp_path / "b silent", time=long_ago)
    a_run(tmp_path / "c dead", time=long_ago)
    here, nobody = socket.gethostname(), subprocess.Popen(["true"])
    nobody.wait()
    unread = subprocess.Popen(["true"])
    os.waitid(os.P_PID, unread.pid, os.WEXITED | os.WNOWAIT)  # it keeps its number
    a_run(tmp_path / "c dead here", time=time.time() - 1, host=here, pid=nobody.pid)
    a_run(tmp_path / "c dead soon", step=0, time=time.time() - 1, host=here, pid=unread.pid)
    a_run(tmp_path / "c without locks", host=here, pid=os.getpid())
    a_run(tmp_path / "d failed", state="failed", error="x.rec: cut\nshort")
    a_run(tmp_path / "e old")
    (a_run(tmp_path / "f old complete") / "summary.json").touch()
    (a_run(tmp_path / "g damaged") / "status.json").write_bytes(b"[")
    a_run(tmp_path / "h foreign", state=5, step="x", steps=None, top1=float("nan"), time=[])
    with (running / ".lock").open() as one, (silent / ".lock").open() as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(two, fcntl.LOCK_EX)
        done = run_here(lambda: run_command("status", main), [str(tmp_path)])
    unread.wait()
    assert done.returncode == 0, done.stderr
    stdout = re.sub(r"written 0:\d\d ago", "written 0:01 ago", done.stdout)
    lines = [line.replace(f"{tmp_path}/", "").split("  ") for line in stdout.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["run", "recipe", "step", "images/s", "ETA", "top-1", "state"],
        ["a running", "uda", "40/100", "123", "12:34", "61.50 %", "running"],
        ["b silent", "uda", "40/100", "123", "12:34", "61.50 %", "running: no step for 1:00:00"],
        [
            "c dead",
            "uda",
            "40/100",
            "123",
            "61.50 %",
            "dead: its process is gone, last written 1:00:00 ago",
        ],
        [
            "c dead here",
            "uda",
            "40/100",
            "123",
            "61.50 %",
            "dead: its process is gone, last written 0:01 ago",
        ],
        [
            "c dead soon",
            "uda",
            "30/100",
            "123",
            "61.50 %",
            "dead: its process is gone, last written 0:01 ago",
        ],
        ["c without locks", "uda", "40/100", "123", "12:34", "61.50 %", "running"],
        ["d failed", "uda", "40/100", "123", "61.50 %", "failed: x.rec: cut short"],
        ["e old", "uda", "30/100", "25", "50.00 %", "unknown"],
        ["f old complete", "uda", "30/100", "25", "50.00 %", "complete"],
        ["g damaged", "uda", "30/100", "25", "50.00 %", "unknown"],
        ["h foreign", "uda", "30/100", "123", "50.00 %", "unknown"],
    ]
    none = run_here(lambda: run_command("status", main), [str(tmp_path / "e old" / "checkpoints")])
    assert none.returncode == 4
    assert none.stderr.endswith("has no config.yaml: name run directories, or a folder of them\n")
    (tmp_path / "above" / "runs" / "run").mkdir(parents=True)
    (tmp_path / "above" / "runs" / "run" / "config.yaml").touch()
    above = run_here(lambda: run_command("status", main), [str(tmp_path / "above")])
    assert above.stderr.endswith(f"or a folder of them, such as {tmp_path / 'above' / 'runs'}\n")


def test_a_run_and_the_one_that_follows_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", state="complete")
    a_run(run / "finetune", state="running")
    assert named(run) == [run, run / "finetune"]
    (tmp_path / "sweep/trials").mkdir(parents=True)
    trial = a_run(tmp_path / "sweep/trials/0000", state="complete")
    for name in ("config.yaml", "sweep.json"):
        (tmp_path / "sweep" / name).write_text("{}")
    assert named(tmp_path) == [run, run / "finetune", trial] and named(trial.parents[1]) == [trial]


def named(folder: Path) -> list[Path]:
    return [Path(line.split()[0]) for line in table([folder]).splitlines()[1:]]


def test_it_is_written_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = a_run(tmp_path / "run")
    one = Status(run, "uda", 100)
    steps = []
    for step in range(31, 36):
        one.update(step=step, eta_seconds=50.0)
        steps.append(read(run).step)
        now += 0.4 * status.SECONDS
    assert steps == [31, 31, 31, 34, 34]
    one.end("failed", "full")
    assert (read(run).step, read(run).state, read(run).error) == (35, "failed", "full")
    assert json.loads((run / "status.json").read_text())["pid"] == os.getpid()


def test_an_error_of_it_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    one = Status(run, "uda", 100)
    shutil.rmtree(run)
    one.end("stopped")
    one.end("stopped")
    line = f"warning: {run}/status.json cannot be written (No such file or directory): it is behind"
    assert capsys.readouterr().err == f"{line} the run\n"
