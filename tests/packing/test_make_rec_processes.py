"""tools/make_rec.py as a process: exit codes, signals, killed runs and workers, parts side by side.

A run that has to be stopped on its way waits for locks of its last shards, which the test has:
however slow the machine, it is stopped when some shards are finished and others are not.
"""

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from mpl_fast.data.manifest import read_manifest
from mpl_fast.first_few import counted
from tests.packing.packs import (
    LIMIT,
    TOOL,
    command_line,
    environment,
    error_of,
    hashes,
    identities,
    image_tree,
    jpeg,
    make_tree,
    names,
    pack,
    read_split,
    refuse,
    run,
    run_process,
)

pytestmark = pytest.mark.slow

SHARDS = 8
KEPT = ("finished shard is", "finished shards are")


def shard_names(*numbers: int) -> list[str]:
    return [f"train-{number:05}-of-{SHARDS:05}.rec" for number in numbers]


LAST = shard_names(5, 6, 7)
SLOW = ("--shards", SHARDS, "-j", 1, "--labeled", "2")
# Runs the tool, and sends it a signal just before it gives a file its final name.
SIGNAL_AT_RENAME = """
import os, runpy, signal, sys
from pathlib import Path
tool, name, when, *arguments = sys.argv[1:]
placed = 0  # files that have their final names

def replace(self, target, original=Path.replace):
    global placed
    if self.parent.name == ".pack" and Path(target).parent.name != ".pack":
        if placed == int(when):
            os.kill(os.getpid(), getattr(signal, name))
        placed += 1
    return original(self, target)

Path.replace = replace
sys.argv = [tool, *arguments]
runpy.run_path(tool, run_name="__main__")
"""


def signal_at_rename(name: str, number: int, *arguments: object) -> int:
    """Run the tool, which gets a signal before its rename of that number; return its exit code."""
    command = [sys.executable, "-c", SIGNAL_AT_RENAME, str(TOOL), name, str(number)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=LIMIT,
    )
    assert done.stderr == ""
    return done.returncode


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_alive(group: int) -> bool:
    """Return whether any process of a group is left that is not a zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


@dataclass
class HeldPack:
    """A pack in a process group of its own whose last shards are locked."""

    work: Path
    process: "subprocess.Popen[str]"
    release: Callable[[], None]  # lets it write the locked shards

    def done(self) -> list[str]:
        """Return the finished shards."""
        return sorted(path.stem for path in self.work.glob("*.rec.done"))

    def workers(self) -> list[int]:
        """Return the processes that write shards."""
        parent = self.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [int(child) for child, command in commands.items() if b"spawn_main" in command]

    def end(self) -> list[str]:
        """Wait until it and its workers have ended; return what it printed but its progress."""
        errors = self.process.communicate(timeout=LIMIT)[1].splitlines()
        wait_until(lambda: not group_is_alive(self.process.pid))
        self.release()
        return [line for line in errors if not line.startswith("packed ")]

    def kill(self) -> None:
        """Kill the parent, and wait until its workers have ended, too."""
        if self.process.returncode is None:
            self.process.kill()
            self.end()


@contextmanager
def held(out: Path, *options: object, last: Sequence[str] = LAST) -> Iterator[HeldPack]:
    """Start a pack that cannot write the shards `last`, and wait until it has finished another.

    If it can, it is writing one more then.
    """
    work = out / ".pack"
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        for name in last:
            lock = locks.enter_context((work / f"{name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command_line("pack", *options, "--out", out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        running = HeldPack(work, process, locks.close)
        free = SHARDS - len(last)
        before = len(running.done())

        def is_met() -> bool:
            assert process.poll() is None, process.communicate()[1]
            done = len(running.done())
            return done >= free or (done > before and any(work.glob("*.rec.tmp")))

        try:
            wait_until(is_met)
            yield running
        finally:
            running.kill()


@pytest.fixture(scope="module")
def slow_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images of the same size: small files of many pixels, which take long to check."""
    colors = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    image = bytes(simplejpeg.encode_jpeg(cv2.resize(colors, (4000, 4000)), quality=30))
    contents = {
        f"{('ant', 'bee')[number % 2]}/{number}.jpg": numbered(image, number)
        for number in range(SHARDS * 4)
    }
    return make_tree(tmp_path_factory.mktemp("slow") / "tree", contents)


def numbered(image: bytes, number: int) -> bytes:
    """Return a JPEG with a comment of 8 digits."""
    return image[:2] + b"\xff\xfe\x00\x0a" + f"{number:08}".encode() + image[2:]


def test_stopped_in_every_way_it_goes_on(slow_tree: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", ("--src", slow_tree, *SLOW)
    kept: dict[str, tuple[int, int]] = {}

    def require_kept(running: HeldPack) -> None:
        """Check that every finished shard stayed, then take in the new ones."""
        assert names(out) == {".lock", ".pack"}
        now = identities(running.work / name for name in running.done())
        assert kept.items() <= now.items()
        kept.update(now)
        assert 1 <= len(kept) < SHARDS

    with held(out, *source) as running:
        running.kill()  # the workers end as well
        assert running.process.returncode == -signal.SIGKILL
        require_kept(running)
    with held(out, *source, "-j", 2) as running:
        os.kill(running.workers()[0], signal.SIGKILL)
        (line,) = running.end()
        assert running.process.returncode == 1
        assert line.startswith(
            "make_rec: error: a worker process died (SIGKILL; out of memory?) while "
            "it was at one of: train-0000"
        )
        require_kept(running)
    with held(out, *source) as running:
        running.process.send_signal(signal.SIGSTOP)
        line = refuse(*source, "--out", out, status=3)
        assert "another make_rec is writing here" in line
        running.process.send_signal(signal.SIGCONT)
        os.killpg(running.process.pid, signal.SIGINT)  # as Ctrl-C: to the workers too
        (line,) = running.end()
        assert running.process.returncode == 130
        assert line == (
            f"make_rec: interrupted; {counted(len(running.done()), *KEPT)} kept in "
            f"{out}/.pack, the same command goes on"
        )
        require_kept(running)
    with held(out, *source, "-j", 2) as running:
        for _ in range(20):  # after the first one they change nothing
            os.killpg(running.process.pid, signal.SIGINT)
            time.sleep(0.01)
        (line,) = running.end()
        assert running.process.returncode == 130
        assert line.startswith("make_rec: interrupted; ")
        require_kept(running)
    run("pack", *source, "-j", 2, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert hashes(out) == hashes(pack(*source, out=tmp_path / "fresh"))


def test_killed_part_of_an_archive_goes_on(slow_tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "all.tar.gz", tmp_path / "out"
    subprocess.run(["tar", "-C", slow_tree, "-czf", archive, "."], check=True)
    source = ("--src", archive, *SLOW)
    # Those of part 1/2 are 0, 2, 4 and 6.
    last = shard_names(1, 3, 4, 5, 6, 7)
    with held(out, *source, "--part", "1/2", last=last) as running:
        running.kill()
        kept = identities(running.work / name for name in running.done())
    assert 1 <= len(kept) <= 2
    for part in ("2/2", "1/2"):
        assert run("pack", *source, "--part", part, "--out", out).stderr == ""  # unpacked already
    run("finish", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert hashes(out) == hashes(pack(*source, out=tmp_path / "fresh"))


def test_stop_before_a_shard_is_finished(slow_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out, "--src", slow_tree, *SLOW, last=shard_names(*range(SHARDS))) as running:
        wait_until(lambda: (running.work / "records.sqlite").exists())
        running.process.terminate()
        (line,) = running.end()
    assert running.process.returncode == 130
    assert line == f"make_rec: interrupted; nothing was kept in {out}"
    assert names(out) == {".lock"}


def test_image_that_changes_meanwhile(slow_tree: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", ("--src", slow_tree, *SLOW)
    with held(out, *source) as running:
        image = slow_tree / image_in(running.work / "records.sqlite", LAST[-1])
        content, key = image.read_bytes(), f"{image.parent.name}/{image.name}"
        edited = content.replace(f"{int(image.stem):08}".encode(), b"another ")
        image.unlink()
        image.write_bytes(edited)
        running.release()
        (line,) = running.end()
    assert running.process.returncode == 4
    assert line == (
        f"make_rec: error: {key}: {image} changed while it was being packed (or since it was "
        "planned); pack again"
    )
    assert names(out) == {".lock", ".pack"}
    kept = identities(running.work / name for name in running.done())
    assert kept
    run("pack", *source, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert {row[2]: row[3] for row in read_split(out, "train")}[key] == edited


def image_in(plan: Path, file: str) -> str:
    """Return the path of an image of a planned shard."""
    query = """SELECT path FROM shards JOIN records ON records.id
               BETWEEN first_id AND first_id + shards.records - 1 WHERE file = ?"""
    with closing(sqlite3.connect(plan)) as table:
        path: str = table.execute(query, (file,)).fetchone()[0]
    return path


@pytest.mark.parametrize(
    ("name", "rename", "force"),
    [("SIGKILL", 4, []), ("SIGKILL", 5, ["--force"]), ("SIGINT", 4, []), ("SIGTERM", 4, [])],
)
def test_signal_while_files_get_their_names(
    tmp_path: Path, name: str, rename: int, force: list[str]
) -> None:
    tree, out = image_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", "6")
    if force:
        pack(*common, "--shards", 2, "--layout", "separate", out=out)
    code = signal_at_rename(name, rename, "pack", *common, "--out", out, *force)
    assert code == (-signal.SIGKILL if name == "SIGKILL" else 0)  # the others come too late
    assert ("manifest.json" in names(out)) == (code == 0)
    assert "already complete" in run("pack", *common, "--out", out).stdout
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_killed_finish_goes_on(tmp_path: Path) -> None:
    tree, out = image_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 3)
    run("pack", *common, "--part", "1/1", "--out", out)
    assert signal_at_rename("SIGKILL", 3, "finish", out) == -signal.SIGKILL
    assert "manifest.json" not in names(out)
    line = refuse(*common, "--part", "1/2", "--out", out, "--force", status=3)
    assert f"first run: make_rec.py finish {out}" in line
    run("finish", out)
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_parts_at_the_same_time(tmp_path: Path) -> None:
    tree, out = image_tree(tmp_path), tmp_path / "out"
    archive = tmp_path / "all.tar.gz"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train", "val"], check=True)
    common = ("--src", f"{archive}:train", "--val", f"{archive}:val", "--labeled", 6, "--shards", 3)
    # Some overlap and wait for each other; of 6 shards in 8 parts the last part has none.
    parts = [
        subprocess.Popen(
            command_line("pack", *common, "--part", part, "-j", 1, "--out", out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for part in ("1/1", "1/2", "2/3", "8/8")
    ]
    errors = [part.communicate(timeout=LIMIT)[1] for part in parts]
    assert [part.returncode for part in parts] == [0] * len(parts), errors
    assert sum("unpacking" in text for text in errors) == 1
    assert run("finish", out).stdout.splitlines()[1] == "labeled: 6 records, 2 a class, 3 shards"
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_exit_codes(tmp_path: Path) -> None:
    tree, out = image_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", 6, "--out", out)
    assert "required: COMMAND" in error_of(run_process(status=2))
    assert "none: no such folder" in error_of(
        run_process("pack", "--src", tmp_path / "none", "--out", out, status=4)
    )
    make_tree(tree / "train", {"ant/large.jpg": jpeg(0, 200)})
    for line in (
        command_line("pack", *common),
        command_line("extract", out, "large.jpg", "--to", "-"),
    ):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT
            )
        assert done.returncode == 3
        assert done.stderr == "make_rec: error: standard output: No space left on device\n"
    assert "already complete" in run("pack", *common).stdout  # the pack is whole


def test_cifar(shared_data: Path, tmp_path: Path) -> None:
    archive = shared_data / "cifar10-jpeg.tar.xz"
    out = pack("--src", f"{archive}:train", "--val", f"{archive}:test", "--labeled", 4000,
               "--shards", 4, out=tmp_path / "out")  # fmt: skip
    manifest = read_manifest(out)
    assert {name: split.records for name, split in manifest.splits.items()} == {
        "train": 50000, "labeled": 4000, "unlabeled": 50000, "val": 10000}  # fmt: skip
    assert manifest.classes[0] == "airplane"
    labels = Counter(row[1] for row in read_split(out, "train_label"))
    assert labels == dict.fromkeys(map(float, range(10)), 400)
    assert len({row[3] for row in read_split(out, "val")}) > 9990  # images, hardly any twice
