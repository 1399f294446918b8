"""Processes of training: signals request a stop, ranks end with torchrun, what becomes of freed
memory, and which GPUs there are without importing torch."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
# A scheduler's, Ctrl-C, a closed terminal, and Slurm's usual warning before the end of the time.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ECHO_SECONDS = 5.0  # a launcher and a scheduler may both forward one and the same request


def die_with_launcher() -> None:
    """Requests a SIGKILL for this process when torchrun is killed, and ends it if that was before;
    without torchrun, or on another system than Linux, does nothing.

    torchrun starts ranks in sessions of their own. If it is killed by SIGKILL it cannot end them,
    and they would keep training, holding GPUs and the lock of the run directory.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        signal_when_parent_ends(signal.SIGKILL)
        if _launcher_has_ended():
            os.kill(os.getpid(), signal.SIGKILL)


def _launcher_has_ended() -> bool:
    """Whether torchrun ended before this process called prctl, which reports later ends only.

    The parent is then init or another process that adopts orphans, and none of those is a Python
    program. As process 1 of a container, torchrun itself is one. A rank that a wrapper of torchrun
    started (``--no-python``) is not the first process of its session: its parent is not known.
    """
    if os.getsid(0) != os.getpid():
        return False
    try:
        program = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return program != b"" and b"python" not in program.rpartition(b"/")[2]


def signal_when_parent_ends(number: int) -> None:
    """Has the system send a signal to this process when its parent has ended; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for later tensors; another C library is left as it is.

    By default it returns large blocks to the system, which then clears each page of the next
    step's tensors again: 5 to 20 % of a step on a CPU.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        # Old versions accept at most 32 MiB.
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 32 << 20)


@contextmanager
def stop_on_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """Calls `request_stop` at the first of `STOPS`; of these, SIGHUP stays ignored under nohup.

    A second signal raises `KeyboardInterrupt` if one of them is SIGINT, unless it arrives within
    `ECHO_SECONDS`. Schedulers repeat the others before they kill, and a checkpoint may be complete
    by then.
    """
    received: list[int] = []
    first = 0.0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        received.append(number)
        first = first or time.monotonic()
        # torchrun forwards a second Ctrl-C as SIGTERM: one SIGINT is enough.
        if signal.SIGINT in received and time.monotonic() - first > ECHO_SECONDS:
            raise KeyboardInterrupt
        request_stop()

    handled = [s for s in STOPS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, handle) for s in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    # Its errors, such as of a missing driver, are lines of the same output.
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)
