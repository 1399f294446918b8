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
ONE_BY_ONE = ["--compile", "off", "--cuda-graphs", "off"]


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
    """As a user starts it: compiled, and its last steps are one graph."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    tuning = ["--recipe", "finetune", "--algorithm.start", str(run)]
    printed, (seen,) = train(
        tmp_path,
        options(run, tiny_rec, "--steps", "10", "--stop-at", "4"),
        options(run, tiny_rec, "--steps", "10"),
        ["evaluate", str(run), *DALI_ON_CPU],
        ["evaluate", str(run), "--device", "cpu"],
        options(tuned, tiny_rec, *tuning, *ONE_BY_ONE, recipe="supervised"),
    )
    assert printed.count("grad_sync allreduce, compile default, cuda_graphs step") == 2
    assert "paused after step 4" in printed
    assert "resuming after step 4" in printed
    assert printed.count("step_00000010: top-1 0.00 %, top-5 0.00 % of 50 images") == 2
    assert "begins with the average of student after step 10" in printed
    assert seen["graph_launches"] == 3  # after WARMUP steps of the second session
    for folder, last in ((run, 10), (tuned, 6)):
        assert json.loads((folder / "summary.json").read_text())["count"] == 50
        trained = [row["step"] for row in rows(folder) if "loss/labeled" in row]
        assert trained == [*range(2, last + 1, 2)]


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
    exchange = ["--grad-sync", sync, *ONE_BY_ONE]
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
