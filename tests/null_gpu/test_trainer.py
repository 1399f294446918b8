"""Runs of users on CUDA, with DALI on the CPU: on one GPU and on two."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.null_gpu import machine
from tests.tiny_run import arguments, rows

pytestmark = pytest.mark.slow
DALI_ON_CPU = ["--device", "cuda", "--data.device", "cpu"]
QUIET = ["--log-every", "100", "--eval-every", "0", "--checkpoint-every", "0"]


def options(run: Path, rec: Path, *more: str, recipe: str = "mpl") -> list[str]:
    """A session of training on CUDA."""
    chosen = [*DALI_ON_CPU, "--deterministic", "false", *more]
    return [*arguments(run, rec, recipe=recipe), *chosen]


def train(out: Path, *sessions: list[str], ranks: int = 0) -> tuple[str, list[dict[str, Any]]]:
    """What some sessions printed, and what the device of each rank has seen."""
    given = (str(out / "seen"), json.dumps(sessions))
    printed = machine.run("tests.null_gpu.trainer", *given, ranks=ranks)
    seen = [json.loads((out / f"seen.{rank}").read_text()) for rank in range(max(ranks, 1))]
    assert [of["refused"] for of in seen] == [[]] * len(seen)
    return printed, seen


def test_a_run_stops_resumes_is_evaluated_and_tuned(tiny_rec: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    tuning = ["--recipe", "finetune", "--algorithm.start", str(run)]
    printed, _ = train(
        tmp_path,
        options(run, tiny_rec, "--stop-at", "4"),
        options(run, tiny_rec, "--cuda-graphs", "step"),
        ["evaluate", str(run), *DALI_ON_CPU],
        options(tuned, tiny_rec, *tuning, recipe="supervised"),
    )
    assert "paused after step 4" in printed
    assert "resuming after step 4" in printed
    assert "step_00000006: top-1 0.00 %, top-5 0.00 % of 50 images" in printed
    assert "begins with the average of student after step 6" in printed
    for folder in (run, tuned):
        assert json.loads((folder / "summary.json").read_text())["count"] == 50
        assert [row["step"] for row in rows(folder) if "loss/labeled" in row] == [2, 4, 6]


# Of an update of each network: gradients and statistics, by DDP apart; and of the feedback.
COLLECTIVES = {"allreduce": 3, "ddp": 5}
OF_NORMS = 28  # of seven layers of two networks, forward and backward
GRAPHS = {"allreduce": "step", "ddp": "off"}


@pytest.mark.parametrize("sync", COLLECTIVES)
def test_two_ranks_stop_resume_and_evaluate(sync: str, tiny_rec: Path, tmp_path: Path) -> None:
    """From one step to the next, neither the loader's copies nor the exchange makes the host wait;
    events limit how many steps it is ahead, and time the first ten steps of DDP. Nor do batch norms
    over both ranks, which a graph of the step includes."""
    run = tmp_path / "run"
    exchange = ["--grad-sync", sync]
    norms = ["--model.norm", "sync", "--cuda-graphs", GRAPHS[sync], "--steps", "12"]
    printed, seen = train(
        tmp_path,
        options(run, tiny_rec, *exchange, *QUIET, "--stop-at", "5"),
        options(run, tiny_rec, *exchange),
        ["evaluate", str(run), *DALI_ON_CPU],
        options(tmp_path / "norms", tiny_rec, *exchange, *QUIET, *norms, "--stop-at", "11"),
        ranks=2,
    )
    assert "resuming after step 5" in printed
    assert printed.count("of 50 images") == 2
    each = COLLECTIVES[sync]
    # The student moves, and DDP has chosen its buckets; the same over six steps later; a graph.
    expected = {2: each, 8: each + OF_NORMS, 13: 0 if sync == "allreduce" else each + OF_NORMS}
    for rank in seen:
        for first, collectives in expected.items():
            steps = slice(first, first + 2)
            assert rank["collectives"][steps] == [collectives] * 2
            waits = rank["waits"][steps]
            assert {wait for step in waits for wait in step} == {"SYNC event"}
            assert sync == "ddp" or max(map(len, waits)) == 1
