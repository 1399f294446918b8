"""A rank without progress reports where it is and ends; a slow rank is named."""

import os
import queue
import threading
from pathlib import Path

import pytest
import torch

from mpl_fast import distributed
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import HUNG
from mpl_fast.training import metrics, watchdog
from mpl_fast.training.metrics import Meter, pop_rank_seconds
from mpl_fast.training.watchdog import Stragglers, Watchdog
from tests.tiny_run import arguments, train_here

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
RANK = DistEnv(1, 2, torch.device("cpu"))
TIMEOUT = 0.05


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set in place of the end of the process."""
    event = threading.Event()

    def end(code: int) -> None:
        assert code == HUNG
        event.set()
        raise SystemExit  # ends the thread

    monkeypatch.setattr("mpl_fast.training.watchdog.os._exit", end)
    monkeypatch.setattr("mpl_fast.training.watchdog.time.sleep", lambda _: None)
    return event


def wait_here(event: threading.Event, seconds: float = 60.0) -> bool:
    return event.wait(seconds)


def test_a_rank_without_progress_reports_its_step_and_stack(
    ended: threading.Event, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    why = queue.SimpleQueue[str]()
    dog = Watchdog(tmp_path, RANK, TIMEOUT, why.put)
    with dog.watching(3):
        for step in (4, 5):
            dog.beat(step)
        assert wait_here(ended)
    report = (tmp_path / "hang/rank_1.txt").read_text()
    assert "rank 1 of 2 on " in report and "s after step 5\n" in report
    assert "in wait_here" in report and "in _report" in report  # all threads
    assert why.get(timeout=60).endswith(f"after step 5: its stack is in {tmp_path}/hang/rank_1.txt")
    printed = capfd.readouterr().err
    assert f"after step 5: its stack is in {tmp_path}/hang/rank_1.txt; a rank without" in printed


def test_long_work_may_take_longer(ended: threading.Event, tmp_path: Path) -> None:
    """First steps, compilation, and what is announced, and each time the step after it, in which
    this rank may wait for others."""
    dog = Watchdog(tmp_path, RANK, TIMEOUT)
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    with dog.watching(0):
        for work in (lambda: None, dog.expect_long_work, lambda: compiled(torch.zeros(1))):
            work()
            assert not wait_here(ended, 5 * TIMEOUT)
            dog.beat()
            assert not wait_here(ended, 5 * TIMEOUT)
            dog.beat()
        assert wait_here(ended)


def test_the_latest_exchanges_are_written_beside_the_stack(
    ended: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = {"gloo": b"exchanges of the CPU", "nccl": b"of the GPU"}
    monkeypatch.setattr(distributed, "traces", lambda: exchanged)
    dog = Watchdog(tmp_path, RANK, TIMEOUT)
    with dog.watching(0):
        for step in (1, 2):
            dog.beat(step)
        assert wait_here(ended)
    for thread in threading.enumerate():  # the process ends without waiting for it
        if thread.name == watchdog.REPORT:
            thread.join(60)
    for backend, trace in exchanged.items():
        assert (tmp_path / f"hang/{backend}_trace_rank_1").read_bytes() == trace


def test_a_blocked_disk_leaves_the_stack_on_stderr(
    ended: threading.Event,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.1)
    (tmp_path / "hang").mkdir()
    pipe = tmp_path / "hang/rank_1.txt"
    os.mkfifo(pipe)  # opening it waits for a reader
    dog = Watchdog(tmp_path, RANK, TIMEOUT)
    with dog.watching(0):
        for step in (1, 2):
            dog.beat(step)
        assert wait_here(ended)
    printed = capfd.readouterr().err
    assert f"{pipe} cannot be written: its stack is below" in printed
    assert "in wait_here" in printed
    with pipe.open():
        pass  # the thread goes on


@pytest.mark.slow
def test_a_disk_that_blocks_ends_the_run_that_waits_for_a_save(
    ended: threading.Event,
    tiny_rec: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first save blocks in the background; the second waits for it."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name == "checkpoint" and not ended.is_set():
            assert ended.wait(60)
        real(descriptor)

    monkeypatch.setattr("mpl_fast.atomic.os.fsync", fsync)
    run = tmp_path / "run"
    given = [*arguments(run, tiny_rec, recipe="supervised"), "--hang-timeout", "3"]
    train_here(*given, "--eval-every", "0")
    assert ended.is_set()
    assert "has made no progress for 3 s after step 4: its stack is" in capfd.readouterr().err
    report = (run / "hang/rank_0.txt").read_text()
    assert "in wait_for_part" in report and "in fsync" in report


def test_progress_of_another_thread_is_enough(ended: threading.Event, tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, RANK, 20 * TIMEOUT)
    with dog.watching(0):
        for step in (1, 2):
            dog.beat(step)
        for _ in range(8):
            dog.not_idle()
            assert not wait_here(ended, 4 * TIMEOUT)
        assert wait_here(ended)


def test_ranks_that_stay_slow_are_named_once() -> None:
    slow = Stragglers(["a", "b", "c"])
    assert slow.add([0.1, 0.25, 0.1], 60) == []
    assert slow.add([0.1, 0.19, 0.1], 60) == []  # not over 2x
    assert slow.add([0.1, 0.25, 0.1], 60) == []
    (line,) = slow.add([0.1, 0.25, 0.1], 60)
    assert line.startswith("rank 1 on b is slow: its steps take 2.5 times those of the others (250")
    assert slow.add([0.1, 0.25, 0.1], 60) == [] == Stragglers(["a"]).add([], 60)


def test_ranks_times_are_exchanged_with_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sum: waits for exchanges are not a rank's own time, and one bad step is none."""
    own = [("mpl_fast.training.metrics.rank", 1), ("mpl_fast.training.metrics.world_size", 2)]
    for name, value in own:
        monkeypatch.setattr(name, lambda value=value: value)
    sums = []

    def sum_over_ranks(mine: torch.Tensor) -> torch.Tensor:
        sums.append(mine)
        other = mine.clone()
        other[:, -2:] = torch.tensor([[0.1, 0.0], [1.0, 0.0]])
        return mine + other

    monkeypatch.setattr(metrics, "sum_over_ranks", sum_over_ranks)
    clock = [0.0]
    monkeypatch.setattr("mpl_fast.training.metrics.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(metrics, "seconds_waited", lambda: 0.7 * clock[0])
    meter = Meter()
    for seconds in (1.0, 1.0, 50.0):
        began = clock[0]
        clock[0] += seconds
        meter.add({"a": torch.tensor(1.0)}, (began, began), 0.7 * began)
    meter.close(3, {}, {})
    ((_, row),) = meter.rows()
    assert len(sums) == 1 and row["a"] == 1.0
    assert pop_rank_seconds(row, torch.device("cpu")) == pytest.approx([0.1, 0.3])
    assert not any(name.startswith(metrics.RANK_SECONDS) for name in row)


def test_on_a_gpu_the_rank_that_waits_for_images_is_the_slow_one() -> None:
    row = {f"{metrics.RANK_SECONDS}{rank}": wait for rank, wait in enumerate((0.0, 0.6))}
    row |= {"train_seconds": 10.0, "steps": 10}
    assert pop_rank_seconds(row, torch.device("cuda")) == pytest.approx([0.4, 1.0])
