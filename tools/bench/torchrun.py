"""Starts a benchmark's ranks with torchrun and reads what rank 0 found."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mpl_fast.untrusted import json_value
from tools.bench.machine import ROOT
from tools.bench.step_variants import Setting


class RanksError(Exception):
    """The ranks failed; the text has the end of what they printed."""


def on_ranks(module: str, ranks: int, setting: Setting, arguments: Sequence[str]) -> Any:
    """The JSON that `module`, run by torchrun as OUT SETTING... ARGUMENTS, writes to OUT.

    Each rank on a CPU has one thread. Raises `RanksError`.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", "-m", module, str(out)]
        command += [*map(str, setting[:4]), setting.device.type, *arguments]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
        if done.returncode:
            raise RanksError(f"{ranks} ranks failed:\n{done.stderr[-4000:]}")
        return json_value(out.read_text())


def arguments_of(given: Sequence[str], device: torch.device) -> tuple[Path, Setting, list[str]]:
    """A rank's command line: where rank 0 writes, the setting on its device, and what follows."""
    out, model, labeled, mu, size, _, *more = given
    return Path(out), Setting(model, int(labeled), int(mu), int(size), device), more
