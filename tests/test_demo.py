"""The demo can be stopped as a person stops it, and claims no more than it measured. (Its results:
`make demo`, which CI runs.)"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpl_fast.config import RunConfig
from tests.tiny_run import ROOT, run_here
from tools import demo
from tools.demo import table

DEMO = ROOT / "tools" / "demo.py"


def test_ctrl_c_saves_and_ends_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--steps", "9000", "--ranks", "1", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
    _, problems = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "demo: interrupted; the same command goes on" in problems
    assert 'demo.py", line' not in problems  # no traceback of ours
    assert list(out.glob("supervised_seed0_9000steps/checkpoints/step_*"))


def test_a_complete_run_of_an_older_version_is_read(tmp_path: Path) -> None:
    summary = tmp_path / "uda_seed0" / "summary.json"
    summary.parent.mkdir()
    summary.write_text('{"top1": 50.0, "steps": 9, "seconds": 2.0, "images_per_second": 3.0}')
    result = demo._over_seeds([demo._result(summary.parent)])
    assert (result["top1"], result["train_seconds"]) == (50.0, 2.0)


@pytest.mark.parametrize("code", [0, 75])
def test_one_start_of_the_ranks_trains_all(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one call, which ends after the run in which a stop is requested, whenever that is."""
    trained = list[tuple[str, int, int, str]]()

    def train(*configs: RunConfig) -> int:
        trained.extend((c.recipe, c.seed, c.steps, Path(c.run_dir).name) for c in configs)
        return code

    monkeypatch.setattr("mpl_fast.training.phases.train", train)
    options = argparse.Namespace(out=tmp_path, steps=7, seeds=2)
    assert demo._train_all(options) == code
    wanted = [(r, seed, 7, f"{r}_seed{seed}_7steps") for seed in range(2) for r in demo.RECIPES]
    assert trained == wanted
    assert capsys.readouterr().out.count("train.py --config") == len(wanted)


@pytest.mark.parametrize(
    ("gpus", "cores", "ranks"), [("", 8, 2), ("", 1, 1), ("GPU 0: H200\n" * 3, 8, 3)]
)
def test_one_rank_a_gpu_and_else_two(
    gpus: str, cores: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = subprocess.CompletedProcess[str]([], 0, gpus)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", lambda command, **options: listed)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert demo._ranks() == ranks


def test_seeds_must_be_positive() -> None:
    done = run_here(demo.main, ["--seeds", "0"])
    assert done.returncode == 2 and "--seeds must be at least 1" in done.stderr


def test_a_shortened_demo_compares_nothing() -> None:
    row = {"top1": 50.0, "top1_sd": None, "train_seconds": 1.0, "images_per_second": 9.0}
    summary = {"supervised": row, "uda": row | {"top1": 51.4}, "mpl": row | {"top1": 51.0}}
    whole, short = (table(summary, argparse.Namespace(seeds=1, steps=n)) for n in (0, 20))
    assert whole.endswith("\n\nMPL is +1.0 points against labeled only, -0.4 against UDA.")
    assert "points" not in short
    assert short.endswith("\n\n--steps 20: a shortened run says nothing about accuracy.")
    assert whole.rpartition("\n")[0] == short.rpartition("\n")[0]
