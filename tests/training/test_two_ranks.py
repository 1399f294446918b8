"""Two ranks with half the batch each end where one rank with all of it does."""

import functools
import subprocess
import sys

import pytest
import torch

from tests.algorithms.problems import assert_same
from tests.tiny_run import ROOT, environment
from tests.training.two_ranks import COMPILED, CONFIGS, DDP, Ended, train

pytestmark = pytest.mark.slow
WITH_FEEDBACK = [name for name in CONFIGS if "mpl" in name and " off" not in name]
# Of a skipped step: counters of batches go on, the average follows, and the rate is the step's.
CHANGES = ("tracked", "average", "lr")
assert_close = functools.partial(assert_same, rtol=1e-6, atol=1e-8)
Pair = tuple[dict[str, Ended], dict[str, Ended]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """What two_ranks.py saved, by rank."""
    out = tmp_path_factory.mktemp("pair") / "state"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ROOT / "tests" / "training" / "two_ranks.py"
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_equals_two(name: str, pair: Pair) -> None:
    one, first, second = train(name), pair[0][name], pair[1][name]
    assert_close(first["learners"], one["learners"])
    assert_close(second["learners"], first["learners"])
    if name in WITH_FEEDBACK:
        assert one["feedback"].abs() > 1e-6
        mean = (first["feedback"] + second["feedback"]) / 2
        torch.testing.assert_close(mean, one["feedback"])


def test_compiled_networks_under_ddp_equal_eager_ones(pair: Pair) -> None:
    assert_close(pair[0]["compiled"]["learners"], pair[0][COMPILED]["learners"])


@pytest.mark.parametrize("name", DDP)
def test_ddp_and_the_flat_exchange_end_alike(name: str, pair: Pair) -> None:
    assert_close(pair[0][f"ddp {name}"]["learners"], pair[0][name]["learners"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_at_most_three_collectives(name: str, pair: Pair) -> None:
    """Gradients and statistics of a learner together, one for each update, and the feedback's."""
    recipe = name.split()[0]
    updates = {"mpl": 2, "mpl_roleplay": 2, "smpl": 2}.get(recipe, 1)
    # The direction of metasemi and of a derivative, or the difference.
    of_feedback = name in WITH_FEEDBACK or recipe == "metasemi"
    assert pair[0][name]["collectives"] == updates + of_feedback


def test_a_bad_batch_on_one_rank_is_skipped_on_both(pair: Pair) -> None:
    first, second = (rank["bad batch"] for rank in pair)
    assert first["skipped"] == second["skipped"] == [0, 1, 0]
    before, after, end = first["states"]
    assert_same(after, before, ignore=CHANGES)
    assert_same(second["states"][2], end, ignore=CHANGES)
    weights = [state["learner"]["network"]["0.weight"] for state in (after, end)]
    assert not torch.equal(*weights)
