"""The kernels without a GPU: the tests of all implementations, on Triton's interpreter.

A file apart from `test_aot.py`, so that two workers can run them at the same time.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = ("test_contract.py", "test_compiled.py", "test_batch_norm.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_on_the_interpreter(name: str) -> None:
    """In a process of its own: Triton decides when a kernel is decorated."""
    file = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-5000:] + out.stderr[-2000:]
    assert " passed" in out.stdout
