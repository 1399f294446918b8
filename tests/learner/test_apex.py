"""Which apex is installed is told right, and a wrong one is an error of one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT

EXPLODES = "raise AssertionError('apex was imported only to look at it')\n"
FUSED_SGD = """
import amp_C
class FusedSGD:
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
        self.given = (params, lr, momentum, nesterov)
"""
ASKED = """
from mpl_fast.learner import apex
from mpl_fast.errors import ConfigError
import sys
sys.argv[1] == "cuda" and setattr(apex.torch.cuda, "is_available", lambda: True)
print(apex.find())
try:
    groups = [{"params": [], "weight_decay": 0.1}]
    made = apex.fused_sgd(groups, lr=0.5, momentum=0.9, nesterov=True)
    print(type(made).__module__, *made.given)
except ConfigError as error:
    print(error.exit_code, error)
"""
NVIDIAS = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from .fused_sgd import FusedSGD\n",
    "apex/optimizers/fused_sgd.py": FUSED_SGD,
}
PACKAGES = {
    "absent": {},
    "another_package": {"apex/__init__.py": EXPLODES, "apex/optimizers.txt": ""},
    "another_package as a module": {"apex.py": EXPLODES},
    "without_extensions": {**NVIDIAS, "apex/__init__.py": EXPLODES},
    "usable": {**NVIDIAS, "amp_C.py": ""},
}


def asked(folder: Path, files: dict[str, str], device: str = "cuda") -> list[str]:
    """Two lines: the state, and what came of an optimizer."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", ASKED, device],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ("absent", "not installed: build it from https://github.com/NVIDIA/apex"),
        ("another_package", "the package named apex here is another one"),
        ("another_package as a module", "pip uninstall apex"),
        ("without_extensions", "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"),
    ],
)
def test_what_is_wrong_is_one_line(installed: str, says: str, tmp_path: Path) -> None:
    state, told = asked(tmp_path, PACKAGES[installed])
    assert state == installed.split()[0]
    assert told.startswith("2 optimizer_backend apex needs ") and says in told


def test_nvidias_gets_the_groups_and_the_rates(tmp_path: Path) -> None:
    state, made = asked(tmp_path, PACKAGES["usable"])
    assert state == "usable"
    assert made == ("apex.optimizers.fused_sgd [{'params': [], 'weight_decay': 0.1}] 0.5 0.9 True")


def test_it_needs_a_gpu(tmp_path: Path) -> None:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        pytest.skip("the environment says which devices there are")
    _, told = asked(tmp_path, PACKAGES["usable"] | {"sitecustomize.py": NO_GPU}, "cpu")
    assert told == "2 optimizer_backend apex needs a CUDA device: take torch, which computes " + (
        "the same"
    )


NO_GPU = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
