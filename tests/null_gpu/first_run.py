"""tools/first_gpu_run.sh from end to end on the null GPU, so that on a GPU only values are new.

    python -m tests.null_gpu.first_run --smoke --minutes 13 --cifar cifar10-jpeg.tar.xz --out OUT

Steps that compare values, use DALI's kernels or read CUPTI fail here.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from tests.null_gpu.machine import ROOT, environment


def main(arguments: Sequence[str]) -> int:
    """The script's exit code."""
    site = ROOT / "tests" / "null_gpu" / "site"
    machine = environment(1) | {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    script = [str(ROOT / "tools" / "first_gpu_run.sh"), *arguments]
    return subprocess.run(script, env=machine, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
