"""CUDA and NCCL on two machines of one GPU: when torchrun is killed on one, the run ends on the
other, and the same commands resume it.

Under torchrun this file trains, and ends with torchrun as `mpl_fast/train.py` does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpl_fast.training.process import die_with_launcher
from tests.null_gpu import machine
from tests.null_gpu.test_trainer import ONE_BY_ONE, options
from tests.tiny_run import free_port

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def pair(out: Path, session: list[str]) -> list[subprocess.Popen[str]]:
    """torchrun of both machines."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
    command += ["--nproc-per-node=1", "--master-addr=localhost", f"--master-port={free_port()}"]
    run = ["-m", "tests.null_gpu.test_two_machines", str(out / "seen"), json.dumps([session])]
    return [
        subprocess.Popen(
            [*command, f"--node-rank={node}", *run],
            cwd=machine.ROOT,
            env=machine.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


def test_a_machine_that_is_lost_ends_the_run_which_then_resumes(
    tiny_rec: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = options(run, tiny_rec, *ONE_BY_ONE, "--steps", "1000000")
    first, second = pair(tmp_path, endless)
    deadline = time.monotonic() + 600
    while not list(run.glob("checkpoints/step_*")):
        assert first.poll() is None and second.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second.kill()
    printed = first.communicate(timeout=600)[0] + second.communicate(timeout=600)[0]
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL), printed
    step = max(int(path.name[5:]) for path in run.glob("checkpoints/step_*"))
    resumed = pair(tmp_path, [*endless, "--stop-at", str(step + 3)])
    printed = "".join(process.communicate(timeout=600)[0] for process in resumed)
    assert [process.returncode for process in resumed] == [0, 0], printed
    assert f"resuming after step {step}" in printed
    assert f"paused after step {step + 3}" in printed
    for rank in range(2):
        assert json.loads((tmp_path / f"seen.{rank}").read_text())["refused"] == []


if __name__ == "__main__":
    from tests.null_gpu import trainer  # loads the stubs

    die_with_launcher()
    trainer.main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # at the end of Python, libraries would read values, too
