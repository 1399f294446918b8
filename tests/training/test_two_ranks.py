"""Two ranks with half the batch each end where one rank with all of it does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.config import RECIPES
from tests.tiny_run import ROOT, environment
from tests.training.two_ranks import CONFIGS

SCRIPT = str(ROOT / "tests" / "training" / "two_ranks.py")
HEARD = [name for name in CONFIGS if name.startswith(("mpl", "smpl"))]


def train(ranks: int, out: Path, *options: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, str(out), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr


def ended(out: Path, recipe: str, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{out}.{recipe}.{rank}", weights_only=True)
    return state


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "state"
    train(1, out, *CONFIGS)
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair") / "state"
    train(2, out, *CONFIGS)
    return out


def assert_close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        message = f"{where} differs"
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=1e-8, msg=lambda m: f"{message}: {m}"
        )


def test_every_recipe_is_here() -> None:
    assert {name.split()[0] for name in CONFIGS} == set(RECIPES)


@pytest.mark.parametrize("recipe", CONFIGS)
def test_one_rank_equals_two(recipe: str, alone: Path, pair: Path) -> None:
    one = ended(alone, recipe, 0)
    first, second = (ended(pair, recipe, rank) for rank in (0, 1))
    assert_close(one["learners"], first["learners"])
    assert_close(first["learners"], second["learners"])
    if recipe in HEARD:
        assert one["h"].abs() > 1e-6
        torch.testing.assert_close((first["h"] + second["h"]) / 2, one["h"])


def test_compiled_networks_under_ddp_equal_eager_ones(alone: Path, tmp_path: Path) -> None:
    train(2, tmp_path / "compiled", "mpl", "--compile")
    compiled = ended(tmp_path / "compiled", "mpl", 0)
    assert_close(ended(alone, "mpl", 0)["learners"], compiled["learners"])


def test_a_step_is_at_most_three_collectives(pair: Path) -> None:
    """Gradients and statistics of a learner together, one for each update, and the feedback's."""
    found = {name: ended(pair, name, 0)["collectives"] for name in CONFIGS}
    for name, count in found.items():
        recipe = name.split()[0]
        updates = {"mpl": 2, "mpl_roleplay": 2, "smpl": 2}.get(recipe, 1)
        heard = recipe in ("mpl", "mpl_roleplay", "smpl", "metasemi")
        assert count == updates + heard, name


def test_ddp_and_the_flat_exchange_end_alike(pair: Path, tmp_path: Path) -> None:
    names = ["mpl", "uda", "smpl", "mpl exact"]
    train(2, tmp_path / "ddp", *names, "--ddp")
    for name in names:
        flat, ddp = ended(pair, name, 0), ended(tmp_path / "ddp", name, 0)
        assert_close(flat["learners"], ddp["learners"])
