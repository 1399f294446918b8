"""A shard is written once: kept when it is whole, written anew when anything is wrong with it."""

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import DataError, UserError
from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.table import TABLE, ShardRow
from mpl_fast.packing.write.pool import Advance, Job, StoppedError, run_jobs
from mpl_fast.packing.write.shard_job import run_job
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt
from tests.packing.packs import KEEP, Planned, identities, jpeg, make_tree, options_of, plan_work

FIRST = "train-00000-of-00002.rec"
LOCK = f"{FIRST}.lock"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a work folder with the plan of 12 images in two shards."""
    images = {f"{name}/{at}.jpg": jpeg(at) for name in ("ant", "bee") for at in range(6)}
    make_tree(tmp_path / "tree", images)
    return plan(tmp_path, KEEP)


def plan(tmp_path: Path, image_options: ImageOptions) -> Path:
    split = SplitOptions(labeled="4", shards=2)
    options = options_of(tmp_path / "tree", tmp_path / "out", split)
    return plan_work(replace(options, image=image_options))


def run(work: Path, image_options: ImageOptions = KEEP) -> tuple[list[Remark], int, int]:
    """Run the job of the first shard; return its remarks, and the images and bytes done."""
    done: list[tuple[int, int]] = []
    remarks = run_job(
        work, first(work), image_options, 0, lambda images, size: done.append((images, size))
    )
    return remarks, sum(images for images, _ in done), sum(size for _, size in done)


def first(work: Path) -> ShardRow:
    return Planned(work / TABLE).shards[0]


def files(work: Path) -> list[Path]:
    return sorted(path for path in work.iterdir() if path.suffix != ".lock")


def names(work: Path) -> list[str]:
    return [path.name for path in files(work)]


def test_whole_shard_is_kept(work: Path) -> None:
    row = first(work)
    assert run(work) == ([], row.records, row.bytes)
    assert names(work) == [TABLE, FIRST, f"{FIRST}.done"]
    before = identities(files(work))
    assert run(work) == ([], row.records, row.bytes)
    assert identities(files(work)) == before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change(receipt: Path, **fields: str) -> None:
    replace(ShardReceipt.load(receipt), **fields).save(receipt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "harm",
    [
        lambda rec, done: flip(rec, 0),
        lambda rec, done: flip(rec, rec.stat().st_size // 2),
        lambda rec, done: flip(rec, -1),
        lambda rec, done: os.truncate(rec, rec.stat().st_size - 4),
        lambda rec, done: os.truncate(rec, rec.stat().st_size + 4),
        lambda rec, done: rec.unlink(),
        lambda rec, done: done.unlink(),
        lambda rec, done: os.truncate(done, done.stat().st_size - 9),
        lambda rec, done: change(done, content="0" * 64),  # of another plan
        lambda rec, done: change(done, stamps="0" * 64),
    ],
)
def test_damaged_shard_is_written_anew(work: Path, harm: Callable[[Path, Path], None]) -> None:
    run(work)
    path, done = work / FIRST, work / f"{FIRST}.done"
    whole = path.read_bytes(), done.read_bytes()
    harm(path, done)
    inode = path.stat().st_ino if path.exists() else None
    run(work)
    assert (path.read_bytes(), done.read_bytes()) == whole
    assert path.stat().st_ino != inode


def test_shard_that_cannot_be_written_anew_is_no_longer_finished(
    work: Path, tmp_path: Path
) -> None:
    run(work)
    flip(work / FIRST, 0)
    for image in (tmp_path / "tree").rglob("*.jpg"):
        image.unlink()
    with pytest.raises(DataError, match="No such file"):
        run(work)
    assert names(work) == [TABLE, FIRST]


def test_bad_images_leave_no_shard_or_are_named_in_every_run(work: Path, tmp_path: Path) -> None:
    for image in (tmp_path / "tree" / "ant").iterdir():
        image.write_bytes(b"no image")
    strict, skip = ImageOptions(), ImageOptions(on_bad="skip")
    plan(tmp_path, strict)
    remarks = run(work, strict)[0]
    rows = Planned(work / TABLE).rows[: first(work).records]
    assert [remark.id for remark in remarks] == [row.id for row in rows if row.label == 0]
    assert {remark.action for remark in remarks} == {"failed"}
    assert names(work) == [TABLE]
    plan(tmp_path, skip)
    skipped = [replace(remark, action="skipped") for remark in remarks]
    assert run(work, skip)[0] == skipped
    before = identities(files(work))
    assert run(work, skip)[0] == skipped
    assert identities(files(work)) == before


@pytest.mark.parametrize("finished", [False, True])
def test_job_that_is_stopped(work: Path, finished: bool) -> None:
    if finished:  # then it is stopped while it reads every byte
        run(work)
    before = identities(files(work))

    def advance(images: int, size: int) -> None:
        assert (images == 0) == finished
        raise StoppedError

    with pytest.raises(StoppedError):
        run_job(work, first(work), KEEP, 0, advance)
    assert identities(files(work)) == before


def test_shard_that_another_process_writes_is_waited_for(work: Path) -> None:
    calls: list[tuple[int, int]] = []

    def advance(images: int, size: int) -> None:
        calls.append((images, size))
        if calls == [(0, 0)] * 2:  # twice it waited
            raise StoppedError

    with (work / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoppedError):
            run_job(work, first(work), KEEP, 0, advance)
    assert names(work) == [TABLE]
    assert run(work)[1] == first(work).records


def test_shard_is_locked_while_it_is_written(work: Path) -> None:
    def advance(images: int, size: int) -> None:
        with (work / LOCK).open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    run_job(work, first(work), KEEP, 0, advance)
    assert names(work) == [TABLE, FIRST, f"{FIRST}.done"]


def succeed(advance: Advance) -> int:
    advance(1, 5)
    return os.getpid()


def fail(advance: Advance) -> int:
    raise DataError("a.jpg: no image")


def die(advance: Advance) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_pool() -> None:
    """Jobs run in other processes; an error ends them all, and a death is named with its job."""
    assert run_jobs([], 1, lambda records, size: None) == []
    seen: list[tuple[int, int]] = []
    jobs = [Job("small", 1, succeed), Job("large", 2, succeed)]
    assert os.getpid() not in run_jobs(jobs, 1, lambda *done: seen.append(done))
    assert seen[-1] == (2, 10)
    with pytest.raises(DataError, match=r"^a\.jpg: no image$"):
        run_jobs([*jobs, Job("last", 0, fail)], 1, lambda records, size: None)
    with pytest.raises(UserError) as caught:
        run_jobs([Job("last", 0, die), *jobs], 1, lambda records, size: None)
    assert str(caught.value) == (
        "a worker process died (SIGKILL; out of memory?) while it was at one of: last; what is "
        "finished is kept: run the same command again, with a smaller -j if memory is short"
    )


def test_worker_that_is_started_while_another_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of Python 3.11 joins a worker that it neither ended nor asked to end."""
    ended, known = threading.Event(), threading.Event()
    start, join = SpawnProcess.start, Queue.join_thread
    spawn = ProcessPoolExecutor._spawn_process  # type: ignore[attr-defined]

    def start_and_kill_others(worker: SpawnProcess) -> None:
        start(worker)
        for other in set(multiprocessing.active_children()) - {worker}:
            other.kill()
            ended.wait(5)  # a later Python waits until this one is known

    def spawn_and_note(pool: ProcessPoolExecutor) -> None:
        spawn(pool)
        if len(pool._processes) > 1:
            known.set()

    def join_later(queue: "Queue[Any]") -> None:
        ended.set()
        known.wait(5)
        join(queue)

    monkeypatch.setattr(SpawnProcess, "start", start_and_kill_others)
    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", spawn_and_note)
    monkeypatch.setattr(Queue, "join_thread", join_later)
    jobs = [Job(name, 1, succeed) for name in ("first", "second")]
    with pytest.raises(UserError, match="a worker process died"):
        run_jobs(jobs, 2, lambda records, size: None)
