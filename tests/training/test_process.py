"""A signal that arrives twice within a moment is one request to stop; a late Ctrl-C ends it.
A rank ends with its torchrun, also if that has ended before the rank could ask for it."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpl_fast.training import process

RANK = """import os, sys, time
launcher = int(sys.argv[1])
while os.getppid() == launcher: time.sleep(0.01)
from mpl_fast.training.process import die_with_launcher
die_with_launcher()
print("lives")"""
LAUNCHER = """import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
os._exit(0)"""


@pytest.mark.parametrize(
    ("first", "late", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, True),  # torchrun's, after a second Ctrl-C
        (signal.SIGTERM, signal.SIGTERM, False),  # a scheduler's, before it kills
        (signal.SIGHUP, signal.SIGTERM, False),
        (signal.SIGUSR1, signal.SIGUSR1, False),
    ],
)
def test_an_echo_is_the_same_request_and_a_late_repetition_ends(
    first: signal.Signals, late: signal.Signals, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1.0]
    monkeypatch.setattr("mpl_fast.training.process.time.monotonic", lambda: clock[0])
    requests: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with process.stop_on_signal(lambda: requests.append(1)):
        os.kill(os.getpid(), first)
        clock[0] = 2.0
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), late)
        assert requests
        clock[0] = 11.0
        with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext():
            os.kill(os.getpid(), late)
    assert signal.getsignal(signal.SIGTERM) == before


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests: list[int] = []
    try:
        with process.stop_on_signal(lambda: requests.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not requests and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("run", [True, False])
def test_a_rank_whose_torchrun_was_killed_at_once_ends(run: bool, root: Path) -> None:
    """Another program that lost its parent goes on."""
    env = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    env |= {"TORCHELASTIC_RUN_ID": "run"} if run else {}
    command = [sys.executable, "-c", LAUNCHER, RANK]
    printed = subprocess.run(command, env=env, cwd=root, stdout=subprocess.PIPE, check=True)
    assert printed.stdout == (b"" if run else b"lives\n")


PAGES = """import resource, sys
from mpl_fast.training.process import keep_freed_memory
if sys.argv[1] == "keep": keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
large = b"\\1" * (31 << 20)  # glibc before 2.35 keeps up to 32 MiB
del large
before = faults()
large = b"\\1" * (31 << 20)
print(faults() - before)"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_asking_the_system(root: Path) -> None:
    new_pages = []
    for what in ("default", "keep"):
        command = [sys.executable, "-c", PAGES, what]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        new_pages.append(int(done.stdout))
    assert new_pages[0] >= 15  # as many as there are huge pages of 2 MiB in it
    assert new_pages[1] < 10
