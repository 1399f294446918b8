"""Runs of users on CUDA, with DALI on the CPU: on one GPU and on two."""

import json
from itertools import pairwise
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


def check_saves(seen: dict[str, Any], before: int, *saves: int) -> None:
    """Of saves in the background after some steps, by their place in `seen`; there was one `before`
    them. The copy waits in the queue of the device, and only the thread that writes waits for it;
    it goes to memory that is pinned already."""
    for save in saves:
        waits = [line for line in seen["waits"][save] if line != "SYNC event"]  # of the host
        assert waits == [] and seen["pinned"][save] <= 1  # metrics of the ranks
    for first, last in pairwise((before, *saves)):
        waits = [line for lines in seen["waits_in_threads"][first:last] for line in lines]
        assert waits == ["SYNC event in a thread"]


def test_a_run_stops_resumes_is_evaluated_and_tuned(tiny_rec: Path, tmp_path: Path) -> None:
    """As a user starts it: compiled, and its last steps are one graph. It diverges once, and a new
    graph takes the place and the memory of the one before."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    tuning = ["--recipe", "finetune", "--algorithm.start", str(run)]
    steps = ["--steps", "16", "--eval-every", "0", "--on-spike", "rollback"]
    printed, (seen,) = train(
        tmp_path,
        options(run, tiny_rec, *steps, "--stop-at", "4"),
        ["diverge", "8"],
        options(run, tiny_rec, *steps),
        ["evaluate", str(run), *DALI_ON_CPU],
        ["evaluate", str(run), "--device", "cpu"],
        options(tuned, tiny_rec, *tuning, *ONE_BY_ONE, recipe="supervised"),
    )
    assert printed.count("grad_sync allreduce, compile default, cuda_graphs step") == 2
    assert "paused after step 4" in printed
    assert "resuming after step 4" in printed
    assert f"back from step 8 to {run}/checkpoints/step_00000006, with the images" in printed
    assert printed.count("step_00000016: top-1 0.00 %, top-5 0.00 % of 50 images") == 2
    assert "begins with the average of student after step 16" in printed
    # Steps 1 to 4, 5 to 8, and 7 to 16, with graphs after WARMUP steps.
    graphs = [7, *range(11, 18)]
    assert [i for i, launches in enumerate(seen["graph_launches"]) if launches] == graphs
    assert [i for i, captures in enumerate(seen["captures"]) if captures] == [7, 11]
    assert seen["escaped"] == [] and max(seen["pools"]) == 1
    check_saves(seen, 11, 13, 15)
    for folder, last in ((run, 16), (tuned, 6)):
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
    over both ranks, which a graph of the step includes, and saves in the background."""
    run = tmp_path / "run"
    exchange = ["--grad-sync", sync, *ONE_BY_ONE]
    norms = ["--model.norm", "sync", "--cuda-graphs", GRAPHS[sync], "--steps", "18"]
    norms += ["--checkpoint-every", "5"]
    printed, seen = train(
        tmp_path,
        options(run, tiny_rec, *exchange, *QUIET, "--stop-at", "5"),
        options(run, tiny_rec, *exchange),
        ["evaluate", str(run), *DALI_ON_CPU],
        options(tmp_path / "norms", tiny_rec, *exchange, *QUIET, *norms, "--stop-at", "17"),
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
        if sync == "allreduce":  # DDP has waits of its own
            check_saves(rank, 10, 15, 20)
    first, second = (rank["copies"][15:21:5] for rank in seen)
    assert min(first) > 100 and first[0] == first[1] and second == [1, 1]  # metrics, on both
