"""CUDA and NCCL on two machines of one GPU: when torchrun is killed on one, the run ends on the other,
and the same commands resume it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.null_gpu import machine
from tests.null_gpu.test_trainer import options

pytestmark = pytest.mark.slow


def pair(out: Path, session: list[str], store: str) -> list[subprocess.Popen[str]]:
    """torchrun of both machines, which find each other by a file."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
    command += ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
    command += [f"--rdzv-endpoint={out / store}", "-m", "tests.null_gpu.trainer"]
    return [
        subprocess.Popen(
            [*command, str(out / "seen"), json.dumps([session])],
            cwd=machine.ROOT,
            env=machine.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]


def test_a_machine_that_is_lost_ends_the_run_which_then_resumes(
    tiny_rec: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = options(run, tiny_rec, "--steps", "1000000")
    first, second = pair(tmp_path, endless, "store")
    deadline = time.monotonic() + 600
    while not list(run.glob("checkpoints/step_*")):
        assert first.poll() is None and second.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    second.kill()
    printed = first.communicate(timeout=600)[0] + second.communicate(timeout=600)[0]
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL), printed
    step = max(int(path.name[5:]) for path in run.glob("checkpoints/step_*"))
    resumed = pair(tmp_path, [*endless, "--stop-at", str(step + 3)], "next store")
    printed = "".join(process.communicate(timeout=600)[0] for process in resumed)
    assert [process.returncode for process in resumed] == [0, 0], printed
    assert f"resuming after step {step}" in printed
    assert f"paused after step {step + 3}" in printed
    for rank in range(2):
        assert json.loads((tmp_path / f"seen.{rank}").read_text())["refused"] == []
