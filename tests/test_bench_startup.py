"""The benchmark of starting times its processes to the right moment; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT
from tools import bench_startup
from tools.bench_starts import processes


@pytest.mark.slow
def test_smoke_measures_every_start(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "startup.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_startup.py", "--smoke", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert (told["form"], told["bench"]) == ("mpl_fast.bench/1", "bench_startup")
    assert "no number here is a claim" in told["claim"]
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [
        "--help",
        "parse a command line",
        "import torch",
        "import the trainer",
        "first step, not compiled",
        "first step, compiled cold",
        "first step, compiled warm",
        "resume to the next step, warm",
    ]
    assert all(row["n"] == 1 and row["median"] > 0 for row in rows.values())
    assert rows["--help"]["target"] == 0.5
    assert "first step, compiled warm" in done.stdout
    # What takes seconds even on an idle machine: the warm start must have been spared it.
    cold, warm = (rows[f"first step, compiled {x}"]["median"] for x in ("cold", "warm"))
    assert warm < cold


def test_a_run_that_fails_ends_the_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--smoke", "--out", str(tmp_path / "x.json"), "--image-size", "4"]
    assert bench_startup.main(given) == 1
    assert "data.image_size must be at least 8, not 4" in capsys.readouterr().err


def test_rows_are_read_when_they_are_whole() -> None:
    assert not processes._has("", 1)
    assert not processes._has('{"step": 1', 1)
    assert processes._has('{"step": 1}\n', 1)
    assert not processes._has('{"step": 1}\n{"step": 2', 2)


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(processes.FailedError, match="ModuleNotFoundError"):
        processes._to_the_end(["-c", "import no_such_module_anywhere"])
