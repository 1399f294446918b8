"""Two ranks with half the batch each end where one rank with all of it does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import ROOT, environment

SCRIPT = str(ROOT / "tests" / "two_ranks.py")


def train(ranks: int, recipe: str, out: Path, *options: str) -> list[dict[str, Any]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, SCRIPT, recipe, str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(ranks)]


def assert_close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        message = f"{where} differs"
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=1e-8, msg=lambda m: f"{message}: {m}"
        )


@pytest.mark.parametrize("recipe", ["supervised", "uda", "mpl"])
def test_one_rank_equals_two(recipe: str, tmp_path: Path) -> None:
    (alone,) = train(1, recipe, tmp_path / "alone")
    first, second = train(2, recipe, tmp_path / "pair")
    assert_close(alone["learners"], first["learners"])
    assert_close(first["learners"], second["learners"])
    if recipe == "mpl":
        assert first["h"].abs() > 1e-6
        torch.testing.assert_close(first["h"], alone["h"])


def test_compiled_networks_under_ddp_equal_eager_ones(tmp_path: Path) -> None:
    (alone,) = train(1, "mpl", tmp_path / "alone")
    compiled, _ = train(2, "mpl", tmp_path / "pair", "default")
    assert_close(alone["learners"], compiled["learners"])
