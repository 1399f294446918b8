"""A shard is written once: kept when it is whole, written anew when anything is wrong with it."""

import fcntl
import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.errors import DataError, UserError
from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.table import TABLE, ShardRow
from mpl_fast.packing.write.pool import StoppedError
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt
from mpl_fast.packing.write.workers import Jobs, run_job, run_local
from tests.packing.packs import (
    KEEP,
    Planned,
    identities,
    jpeg,
    make_tree,
    options_of,
    plan_work,
    write_shards,
)

FIRST, SECOND = "train-00000-of-00002.rec", "train-00001-of-00002.rec"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a work folder with the plan of 12 images in two shards."""
    names = [f"{name}/{at}.jpg" for name in ("ant", "bee") for at in range(6)]
    tree = make_tree(tmp_path / "tree", {name: jpeg(at) for at, name in enumerate(names)})
    return plan_work(options_of(tree, tmp_path / "out", SplitOptions(labeled="4", shards=2)))


def run(
    work: Path, number: int, image_options: ImageOptions = KEEP
) -> tuple[list[Remark], int, int]:
    """Run the job of a shard; return its remarks, and the images and bytes that it told of."""
    told: list[tuple[int, int]] = []

    def advance(images: int, size: int) -> None:
        told.append((images, size))

    remarks = run_job(work, number, image_options, 0, advance)
    return remarks, sum(images for images, _ in told), sum(size for _, size in told)


def shard(work: Path, number: int = 0) -> ShardRow:
    return Planned(work / TABLE).shards[number]


def files(work: Path, name: str = FIRST) -> list[Path]:
    return [work / name, work / f"{name}.done"]


def test_whole_shard_is_kept(work: Path) -> None:
    row = shard(work)
    assert run(work, 0) == ([], row.records, row.bytes)
    before = identities(files(work))
    assert run(work, 0) == ([], row.records, row.bytes)
    assert identities(files(work)) == before
    assert not (work / SECOND).exists()


def test_shard_with_any_flipped_bit_is_written_anew(work: Path) -> None:
    run(work, 0)
    path = work / FIRST
    whole = path.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        run(work, 0)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "not done", "damaged done"])
def test_damaged_shard_is_written_anew(work: Path, damage: str) -> None:
    run(work, 0)
    path, done = files(work)
    whole, told = path.read_bytes(), done.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-4])
    elif damage == "grown":
        path.write_bytes(whole + bytes(4))
    elif damage == "gone":
        path.unlink()
    elif damage == "not done":
        done.unlink()
    else:
        done.write_bytes(told[:-9])
    inode = path.stat().st_ino if path.exists() else 0
    run(work, 0)
    assert (path.read_bytes(), done.read_bytes()) == (whole, told)
    assert path.stat().st_ino != inode


@pytest.mark.parametrize("field", ["content", "stamps"])
def test_shard_of_another_plan_is_written_anew(work: Path, field: str) -> None:
    run(work, 0)
    path, done = files(work)
    replace(ShardReceipt.load(done), **{field: "0" * 64}).save(done)  # type: ignore[arg-type]
    before = identities([path])
    run(work, 0)
    assert identities([path]) != before
    assert getattr(ShardReceipt.load(done), field) == getattr(shard(work), field)


def test_shard_that_cannot_be_written_anew_is_no_longer_finished(
    work: Path, tmp_path: Path
) -> None:
    run(work, 0)
    path, done = files(work)
    path.write_bytes(bytes(path.stat().st_size))
    for image in (tmp_path / "tree").rglob("*.jpg"):
        image.unlink()
    with pytest.raises(DataError, match="No such file"):
        run(work, 0)
    assert not done.exists()


def test_remarks_of_a_kept_shard_are_told_again(work: Path, tmp_path: Path) -> None:
    skip = ImageOptions(on_bad="skip")
    for image in (tmp_path / "tree" / "ant").iterdir():
        image.write_bytes(b"no image")
    plan_work(
        replace(
            options_of(tmp_path / "tree", tmp_path / "out", SplitOptions(labeled="4", shards=2)),
            image=skip,
        )
    )
    remarks = run(work, 0, skip)[0]
    assert {remark.action for remark in remarks} == {"skipped"}
    ants = {row.id for row in Planned(work / TABLE).rows[: shard(work).records] if row.label == 0}
    assert {remark.id for remark in remarks} == ants
    before = identities(files(work))
    assert run(work, 0, skip)[0] == remarks
    assert identities(files(work)) == before


def test_failed_images_leave_no_shard(work: Path, tmp_path: Path) -> None:
    for image in (tmp_path / "tree" / "ant").iterdir():
        image.write_bytes(b"no image")
    options = options_of(tmp_path / "tree", tmp_path / "out", SplitOptions(labeled="4", shards=2))
    plan_work(replace(options, image=ImageOptions()))
    remarks = run(work, 0, ImageOptions())[0]
    assert {remark.action for remark in remarks} == {"failed"}
    assert [path.name for path in work.iterdir()] == [TABLE]


@pytest.mark.parametrize("finished", [False, True])
def test_job_that_is_told_to_stop(work: Path, finished: bool) -> None:
    if finished:  # then it is stopped while it looks at every byte
        run(work, 0)
    before = identities(work.iterdir())

    def advance(images: int, size: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        run_job(work, 0, KEEP, 0, advance)
    assert identities(work.iterdir()) == before


def jobs(work: Path, image_options: ImageOptions = KEEP, threads: int = 0) -> Jobs:
    return Jobs(work, Planned(work / TABLE).shards, image_options, threads)


def test_pool_writes_what_one_process_writes(work: Path, tmp_path: Path) -> None:
    write_shards(work)
    alone = {path.name: path.read_bytes() for path in work.iterdir()}
    for name in (FIRST, f"{FIRST}.done", SECOND, f"{SECOND}.done"):
        (work / name).unlink()
    told: list[tuple[int, int]] = []
    remarks = run_local(jobs(work, threads=2), 2, lambda *done: told.append(done))
    assert remarks == [[], []]
    assert {path.name: path.read_bytes() for path in work.iterdir()} == alone
    size = sum(path.stat().st_size for path in (tmp_path / "tree").rglob("*.jpg"))
    assert told[-1] == (12, size)
    assert told == sorted(told)


def last_begun(work: Path) -> tuple[ShardRow, str, list[str]]:
    """Return the shard that one process begins last (the smallest), the path of an image of it,
    and the files in work when the other shard is finished."""
    small, large = sorted(Planned(work / TABLE).shards, key=lambda shard: shard.bytes)
    assert small.bytes < large.bytes
    path = Planned(work / TABLE).rows[small.first_id + 3].path
    return small, path, sorted([TABLE, large.file, f"{large.file}.done"])


def test_error_of_one_job_ends_the_pool(work: Path, tmp_path: Path) -> None:
    _, path, left = last_begun(work)
    (tmp_path / "tree" / path).unlink()
    with pytest.raises(DataError, match=f"{path}: .*; it was there when planned"):
        run_local(jobs(work), 1, lambda images, size: None)
    assert sorted(path.name for path in work.iterdir()) == left


def test_shard_that_another_process_writes_is_waited_for(work: Path) -> None:
    calls: list[tuple[int, int]] = []

    def advance(images: int, size: int) -> None:
        calls.append((images, size))
        if calls == [(0, 0)] * 2:  # twice it waited
            raise StoppedError

    with (work / f"{FIRST}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoppedError):
            run_job(work, 0, KEEP, 0, advance)
    assert sorted(path.name for path in work.iterdir()) == [TABLE, f"{FIRST}.lock"]
    assert run(work, 0)[1] == shard(work).records


def test_nothing_to_do(work: Path) -> None:
    assert run_local(replace(jobs(work), shards=[]), 2, lambda images, size: None) == []


def worker_in(path: Path) -> int | None:
    """Return the process below this one that has path open; None when there is none."""
    me = os.getpid()
    for child in Path(f"/proc/{me}/task/{me}/children").read_text().split():
        with suppress(OSError):  # it ended while we looked
            if any(file.readlink() == path for file in Path(f"/proc/{child}/fd").iterdir()):
                return int(child)
    return None


def test_dead_worker_is_named_with_its_shard(work: Path, tmp_path: Path) -> None:
    shard, path, left = last_begun(work)
    ended = threading.Event()

    def kill_late() -> None:
        """Kill the worker while it reads an image that never comes."""
        while not ended.wait(0.01):
            worker = worker_in(work / f"{shard.file}.tmp")
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
                return

    image = tmp_path / "tree" / path
    image.unlink()
    os.mkfifo(image)
    killer = threading.Thread(target=kill_late)
    killer.start()
    try:
        with pytest.raises(UserError) as caught:
            run_local(jobs(work), 1, lambda images, size: None)
    finally:
        ended.set()
        killer.join()
    assert str(caught.value) == (
        "a worker process died (SIGKILL; out of memory?) while it was at one of: "
        f"{shard.file}; what is finished is kept: run the same command again, with a smaller -j if "
        "memory is short"
    )
    begun = [f"{shard.file}.lock", f"{shard.file}.tmp"]
    assert sorted(path.name for path in work.iterdir()) == sorted([*left, *begun])
