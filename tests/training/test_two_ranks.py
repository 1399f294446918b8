"""Two ranks with half the batch each end where one rank with all of it does."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.algorithms.problems import assert_same
from tests.tiny_run import ROOT, environment
from tests.training.two_ranks import CONFIGS

pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "tests" / "training" / "two_ranks.py")
WITH_FEEDBACK = [name for name in CONFIGS if "mpl" in name and " off" not in name]
assert_close = functools.partial(assert_same, rtol=1e-6, atol=1e-8)


def train(ranks: int, out: Path, *options: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, str(out), *options],
        capture_output=True,
        text=True,
        timeout=1800,
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


@pytest.mark.parametrize("recipe", CONFIGS)
def test_one_rank_equals_two(recipe: str, alone: Path, pair: Path) -> None:
    one = ended(alone, recipe, 0)
    first, second = (ended(pair, recipe, rank) for rank in (0, 1))
    assert_close(first["learners"], one["learners"])
    assert_close(second["learners"], first["learners"])
    if recipe in WITH_FEEDBACK:
        assert one["feedback"].abs() > 1e-6
        mean = (first["feedback"] + second["feedback"]) / 2
        torch.testing.assert_close(mean, one["feedback"])


def test_compiled_networks_under_ddp_equal_eager_ones(alone: Path, tmp_path: Path) -> None:
    train(2, tmp_path / "compiled", "mpl difference", "--compile")
    compiled = ended(tmp_path / "compiled", "mpl difference", 0)
    assert_close(compiled["learners"], ended(alone, "mpl difference", 0)["learners"])


def test_a_step_is_at_most_three_collectives(pair: Path) -> None:
    """Gradients and statistics of a learner together, one for each update, and the feedback's."""
    found = {name: ended(pair, name, 0)["collectives"] for name in CONFIGS}
    for name, count in found.items():
        recipe = name.split()[0]
        updates = {"mpl": 2, "mpl_roleplay": 2, "smpl": 2}.get(recipe, 1)
        # The direction of metasemi and of a derivative, or the difference.
        of_feedback = name in WITH_FEEDBACK or recipe == "metasemi"
        assert count == updates + of_feedback, name


def test_ddp_and_the_flat_exchange_end_alike(pair: Path, tmp_path: Path) -> None:
    names = ["mpl difference", "uda", "smpl difference", "mpl exact"]
    train(2, tmp_path / "ddp", *names, "--ddp")
    for name in names:
        flat, ddp = ended(pair, name, 0), ended(tmp_path / "ddp", name, 0)
        assert_close(ddp["learners"], flat["learners"])
