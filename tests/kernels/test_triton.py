"""The kernels' values without a GPU, on Triton's interpreter: every *in_interpreter.py beside this.

A file apart from `test_aot.py`, so that two workers can run them at the same time.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.slow
def test_values_on_the_interpreter() -> None:
    """In one process of its own: Triton decides when a kernel is decorated."""
    files = sorted(map(str, HERE.glob("*in_interpreter.py")))
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-5000:] + out.stderr[-2000:]
    assert " passed" in out.stdout
