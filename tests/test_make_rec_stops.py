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
from tests.pack_command import TOOL, jpeg, make_tree, names, run


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
