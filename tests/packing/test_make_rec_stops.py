"""tools/make_rec.py interrupted or killed: an end within seconds, and the same command goes on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.packing.pack_command import hashes, identities, make_tree, names, pack, refuse, run

from mpl_fast.data.manifest import read_manifest
from tests.packing.stopped_packs import SLOW, SlowPack, make_slow_tree, run_meddled


@pytest.fixture(scope="module")
def slow_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slow_tree(tmp_path_factory.mktemp("slow") / "tree")


@pytest.fixture(scope="module")
def whole(slow_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The slow tree's pack, never stopped."""
    return hashes(pack("--src", slow_tree, *SLOW, out=tmp_path_factory.mktemp("whole") / "out"))


@contextmanager
def started(tree: Path, out: Path, *options: object, finished: int = 1) -> Iterator[SlowPack]:
    running = SlowPack(("--src", tree, *SLOW), out, *options, finished=finished)
    try:
        yield running
    finally:
        running.kill()


def go_on(running: SlowPack, tree: Path, out: Path) -> dict[str, str]:
    """Run the command again: the shards that were finished stay; return the pack's hashes."""
    assert names(out) == {".lock", ".pack"}
    kept = identities(running.work / name for name in running.done())
    assert 1 <= len(kept) < 8
    run("pack", "--src", tree, *SLOW, "-j", 2, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    return hashes(out)


def test_killed_run_goes_on(slow_tree: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(2):  # killed when it goes on, too
        with started(slow_tree, out, finished=1 + number) as running:
            running.kill()  # the workers end as well
            assert running.process.returncode == -signal.SIGKILL
    assert go_on(running, slow_tree, out) == whole


def test_killed_worker_is_an_error(slow_tree: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(slow_tree, out, "-j", 2) as running:
        os.kill(running.workers()[0], signal.SIGKILL)
        (line,) = running.wait()
    assert running.process.returncode == 1
    assert line.startswith(
        "make_rec: error: a worker process died (SIGKILL; out of memory?) while "
        "it was at one of: train-0000"
    )
    assert go_on(running, slow_tree, out) == whole


def test_interrupt_keeps_finished_shards(
    slow_tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(slow_tree, out) as running:
        running.signal(signal.SIGSTOP)
        line = refuse("--src", slow_tree, *SLOW, "--out", out, status=3)
        assert "another make_rec is writing here" in line
        running.signal(signal.SIGCONT)
        running.signal(signal.SIGINT, group=True)  # as Ctrl-C: to the workers too
        (line,) = running.wait()
    assert running.process.returncode == 130
    assert line == (
        f"make_rec: interrupted; {len(running.done())} finished shards are kept in {out}/.pack, "
        "the same command goes on"
    )
    assert go_on(running, slow_tree, out) == whole


def test_second_interrupt_changes_nothing(
    slow_tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(slow_tree, out, "-j", 2) as running:
        for _ in range(20):
            running.signal(signal.SIGINT, group=True)
            time.sleep(0.01)
        (line,) = running.wait()
    assert running.process.returncode == 130
    assert line.startswith("make_rec: interrupted; ")
    assert go_on(running, slow_tree, out) == whole


def test_stop_before_a_shard_is_finished(slow_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(slow_tree, out, "--shards", 1, finished=0) as running:
        running.signal(signal.SIGTERM)
        (line,) = running.wait()
    assert running.process.returncode == 130
    assert line == f"make_rec: interrupted; nothing was kept in {out}"
    assert not out.exists()


def test_killed_part_goes_on(slow_tree: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(slow_tree, out, "--part", "1/2") as running:
        running.kill()
    kept = identities(running.work / name for name in running.done())
    for part in ("2/2", "1/2"):
        run("pack", "--src", slow_tree, *SLOW, "--part", part, "--out", out)
    run("finish", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert hashes(out) == whole


@pytest.mark.parametrize(("rename", "force"), [(0, []), (4, []), (7, []), (5, ["--force"])])
def test_kill_while_files_get_their_names(tmp_path: Path, rename: int, force: list[str]) -> None:
    tree, out = make_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", "6")
    if force:
        run("pack", *common, "--shards", 2, "--layout", "separate", "--out", out)
    done = run_meddled("SIGKILL", rename, "pack", *common, "--out", out, *force)
    assert done.returncode == -signal.SIGKILL
    assert "manifest.json" not in names(out)
    assert "already complete" in run("pack", *common, "--out", out).stdout
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_kill_when_all_files_have_their_names(tmp_path: Path) -> None:
    tree, out = make_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", "6", "--shards", 2, "--out", out)
    run("pack", *common)
    before = hashes(out)
    (out / ".pack").mkdir()  # as a kill within the removal of the work folder leaves it
    (out / ".pack" / "train-00000-of-00002.rec.done").write_bytes(b"PK")
    (out / ".pack" / "train-00000-of-00002.rec.lock").write_bytes(b"")
    for command in (("finish", out), ("pack", *common), ("resplit", out, "--labeled", "6")):
        run(*command)
        assert not (out / ".pack").exists()
        if command[0] != "resplit":
            assert hashes(out) == before
        (out / ".pack").mkdir()
        (out / ".pack" / "train-00000-of-00002.rec.done").write_bytes(b"PK")


@pytest.mark.parametrize("action", ["SIGINT", "SIGTERM"])
def test_stop_while_files_get_their_names_comes_too_late(tmp_path: Path, action: str) -> None:
    tree, out = make_tree(tmp_path), tmp_path / "out"
    done = run_meddled(action, 4, "pack", "--src", tree / "train", "--out", out, "--labeled", "6")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert read_manifest(out).splits["labeled"].records == 6
