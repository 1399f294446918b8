"""Whole runs on a GPU: under NCCL, with DALI on the GPU, CUDA graphs and compiled networks."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpl_fast.errors import PREEMPTED
from tests.algorithms.problems import assert_same
from tests.tiny_run import arguments, command, environment, final_state, launch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EAGER = ["--compile", "off", "--cuda-graphs", "off"]
GRAPH = ["--compile", "off", "--cuda-graphs", "step"]
BOTH = ["--compile", "default", "--cuda-graphs", "step"]
MODES = [("gpu", "mpl", EAGER), ("gpu", "mpl", GRAPH), ("gpu", "mpl", BOTH)]
MODES += [("gpu", "dali", EAGER), ("cpu", "mpl", GRAPH)]


def options_of(folder: Path, rec: Path, *more: str) -> list[str]:
    return [*arguments(folder, rec), "--device", DEVICE, "--deterministic", "false", *more]


def under_torchrun(*sessions: list[str]) -> str:
    """What sessions of one rank printed, which share a process and its process group."""
    done = launch("tests.tiny_run", json.dumps(sessions), ranks=1)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("where", "policy", "more"), MODES, ids=[" ".join([w, p, *m[1::2]]) for w, p, m in MODES]
)
def test_a_run_under_nccl_stops_resumes_and_is_evaluated(
    where: str, policy: str, more: list[str], tiny_rec: Path, tmp_path: Path
) -> None:
    """`where`: DALI's device. It is stopped before a step is captured, and resumed until the graph
    has been replayed."""
    folder = tmp_path / "run"
    options = options_of(folder, tiny_rec, "--data.policy", policy, "--data.device", where)
    options += ["--steps", "14", *more]
    stopped, evaluation = [*options, "--stop-at", "3"], ["evaluate", str(folder)]
    printed = under_torchrun(stopped, options, evaluation)
    assert "paused after step 3" in printed
    assert "resuming after step 3" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["count"] == 50
    assert f"step_00000014: top-1 {summary['top1']:.2f} %" in printed


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_rec: Path, tmp_path: Path) -> None:
    """With deterministic kernels."""
    straight, resumed = tmp_path / "straight" / "run", tmp_path / "resumed" / "run"
    one, two = (
        options_of(f, tiny_rec, *EAGER, "--deterministic", "true") for f in (straight, resumed)
    )
    under_torchrun(one, [*two, "--stop-at", "3"], two)
    assert_same(final_state(resumed), final_state(straight), ignore=("seconds",))


def test_sigterm_saves_and_ends_with_its_code(tiny_rec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = options_of(folder, tiny_rec, *EAGER, "--steps", "1000000", "--eval-every", "0")
    given = command(options)
    process = subprocess.Popen(given, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/step_*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == PREEMPTED
    assert "by a signal after step" in printed
