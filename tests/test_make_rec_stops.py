"""tools/make_rec.py interrupted or killed: an end within seconds, and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpl_fast.data.manifest import read_manifest
from tests.pack_command import TOOL, jpeg, make_tree, names, refuse, run, sizes_and_hashes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Return a function that starts a pack of many large images and waits until it writes."""
    folder = tmp_path / "slow" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(jpeg(0, 2000))
    for number in range(1, 400):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        out = tmp_path / "out"
        process = subprocess.Popen(
            [sys.executable, str(TOOL), "pack", "--src", str(folder.parent), "--out", str(out)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_until(lambda: (out / ".train_unlabel.rec.tmp").exists())
        return process

    yield start
    for process in started:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def group_is_alive(group: int) -> bool:
    """Tell whether any process of a group is left that is not a zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    spawned = (child for child in children if b"spawn_main" in command_of(child))
    return [int(child) for child in spawned]


def command_of(process: str) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


# Runs the tool, and something of the test's own at one call of a function.
MEDDLE = """
import os, runpy, signal, sys
from pathlib import Path
tool, action, when, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(tool).parent.parent))
from mpl_fast.packing.out_folder import OutFolder

def meddled(function):
    calls = []
    def call(self, argument, *rest):
        calls.append(argument)
        if when in (str(len(calls)), argument):
            if action == "full":
                raise OSError(28, "No space left on device")
            os.kill(os.getpid(), getattr(signal, action))
        return function(self, argument, *rest)
    return call

if action == "full":
    OutFolder.write_text = meddled(OutFolder.write_text)
else:
    Path.replace = meddled(Path.replace)
sys.argv = [tool, "pack", *arguments]
runpy.run_path(tool, run_name="__main__")
"""


def run_meddled(
    action: str, when: object, *arguments: object
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", MEDDLE, str(TOOL), action, str(when), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("rename", [1, 4, 8])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_kill_within_publish(tree: Path, tmp_path: Path, rename: int, force: list[str]) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out, "--labeled", "6")
    if force:
        run("pack", *common, "--labeled", "3", "--shards", 2)
    done = run_meddled("SIGKILL", rename, *common, *force)
    assert done.returncode == -signal.SIGKILL
    assert "manifest.json" not in names(out)
    assert "already complete" in run("pack", *common).stdout
    run("pack", *common, "--out", tmp_path / "fresh")
    assert sizes_and_hashes(out) == sizes_and_hashes(tmp_path / "fresh")


@pytest.mark.parametrize("action", ["SIGINT", "SIGTERM"])
def test_stop_within_publish(tree: Path, tmp_path: Path, action: str) -> None:
    out = tmp_path / "out"
    done = run_meddled(action, 4, "--src", tree / "train", "--out", out, "--labeled", "6")
    assert done.returncode == 0, done.stderr
    assert "nothing was kept" not in done.stderr
    assert read_manifest(out).splits["labeled"].records == 6


@pytest.mark.parametrize("name", ["classes.txt", "train_unlabel.idx", "manifest.json"])
def test_full_disk_at_the_end(tree: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    done = run_meddled("full", name, "--src", tree / "train", "--out", out, "--labeled", "6")
    assert done.returncode == 3
    assert done.stderr == f"make_rec: error: {out}: No space left on device\n"
    assert not out.exists()


def test_full_disk_while_unpacking(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tgz", tmp_path / "out"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train"], check=True)
    line = refuse("--src", f"{archive}:train", "--out", out, status=3, limit="4")
    assert line == f"make_rec: error: {out}: File too large"
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(
    slow: Callable[[], "subprocess.Popen[str]"], tmp_path: Path, number: signal.Signals
) -> None:
    process = slow()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C: to the workers too
    else:
        process.send_signal(number)
    errors = process.communicate(timeout=20)[1].splitlines()
    assert process.returncode == 130
    assert errors[-1] == f"make_rec: interrupted, nothing was kept in {tmp_path / 'out'}"
    assert all(line.startswith("packed ") for line in errors[:-1])
    assert not (tmp_path / "out").exists()
    wait_until(lambda: not group_is_alive(process.pid))


def test_dead_worker_is_an_error(
    slow: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = slow()
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    errors = process.communicate(timeout=20)[1].splitlines()
    assert process.returncode == 1
    assert "a worker process ended without a word" in errors[-1]
    assert not (tmp_path / "out").exists()
    wait_until(lambda: not group_is_alive(process.pid))


def test_killed_run_leaves_nothing_that_looks_complete(
    slow: Callable[[], "subprocess.Popen[str]"], tree: Path, tmp_path: Path
) -> None:
    process = slow()
    process.kill()
    process.wait(20)
    wait_until(lambda: not group_is_alive(process.pid))
    out = tmp_path / "out"
    assert all(name.startswith(".") for name in names(out))
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "6")
    assert not [name for name in names(out) if name.endswith(".tmp")]
    assert read_manifest(out).splits["labeled"].records == 6
