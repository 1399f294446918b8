"""Which package is installed as apex is detected, and a wrong one is an error of one line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpl_fast.errors import ConfigError
from mpl_fast.learner import apex

RAISES = "raise AssertionError('apex was imported')\n"
FUSED_SGD = """
import amp_C
class FusedSGD:
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
        self.given = (params, lr, momentum, nesterov)
"""
NVIDIAS = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from .fused_sgd import FusedSGD\n",
    "apex/optimizers/fused_sgd.py": FUSED_SGD,
}
PACKAGES = {
    "absent": {},
    "another_package": {"apex/__init__.py": RAISES, "apex/optimizers.txt": ""},
    "another_package as a module": {"apex.py": RAISES},
    "without_extensions": {**NVIDIAS, "apex/__init__.py": RAISES},
    "usable": {**NVIDIAS, "amp_C.py": ""},
}
GROUPS = [{"params": [], "weight_decay": 0.1}]


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """Whatever a test imports as apex is forgotten by the next one."""
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def install(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, cuda: bool = True) -> None:
    for file, text in PACKAGES[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ("absent", "not installed: build it from https://github.com/NVIDIA/apex"),
        ("another_package", "the package named apex here is another one"),
        ("another_package as a module", "pip uninstall apex"),
        ("without_extensions", "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"),
        ("usable", "a CUDA device: take torch, which computes the same"),
    ],
)
def test_what_is_wrong_is_one_line(
    installed: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(installed, tmp_path, monkeypatch, cuda=installed != "usable")
    assert apex.find() == installed.split()[0]
    with pytest.raises(ConfigError) as raised:
        apex.fused_sgd(GROUPS, lr=0.5, momentum=0.9, nesterov=True)
    error = str(raised.value)
    assert raised.value.exit_code == 2 and len(error.splitlines()) == 1
    assert error.startswith("optimizer_backend apex needs ") and words in error


def test_fused_sgd_gets_the_groups_and_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("usable", tmp_path, monkeypatch)
    assert apex.find() == "usable" and "apex" not in sys.modules
    made = apex.fused_sgd(GROUPS, lr=0.5, momentum=0.9, nesterov=True)
    assert type(made).__module__ == "apex.optimizers.fused_sgd"
    assert made.given == (GROUPS, 0.5, 0.9, True)  # type: ignore[attr-defined]
