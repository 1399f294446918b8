"""Packs that are stopped on their way: slow ones for signals, and one that is met at a rename."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from tests.packing.pack_command import TOOL, command_line, environment

SHARDS = 8
SLOW = ("--shards", SHARDS, "-j", 1, "--labeled", "2")
# Runs the tool, and does something of the test's own when a function is called.
MEDDLE = """
import os, runpy, signal, sys
from pathlib import Path
tool, action, when, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(tool).parent.parent))
from mpl_fast import atomic
from mpl_fast.packing.publish.out_folder import OutFolder

placed = []  # the files that got their place in OUT

def replace(self, target, original=Path.replace):
    if self.parent.name == ".pack" and Path(target).parent.name != ".pack":
        if when in (str(len(placed)), self.name):
            os.kill(os.getpid(), getattr(signal, action))
        placed.append(self.name)
    return original(self, target)

def write(self, block, original=atomic._HashingFile.write):
    if Path(self.name).name == when + ".tmp":
        raise OSError(28, "No space left on device")
    return original(self, block)

if action == "blind":
    OutFolder.require_space = lambda self, needed: None
elif action == "full":
    atomic._HashingFile.write = write
else:
    Path.replace = replace
sys.argv = [tool, *arguments]
runpy.run_path(tool, run_name="__main__")
"""


def run_meddled(action: str, when: object, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool; send it the signal `action` just before it gives a file its place: the
    `when`-th one, or that of this name. With "full", the disk is full for the text file `when`;
    with "blind", the tool does not see beforehand that space is short."""
    return subprocess.run(
        [sys.executable, "-c", MEDDLE, str(TOOL), action, str(when), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )


def make_slow_tree(root: Path) -> Path:
    """Make and return a folder of 96 images, small files of many pixels: some 2 s to check."""
    colors = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    image = bytes(simplejpeg.encode_jpeg(cv2.resize(colors, (4000, 4000)), quality=30))
    for number in range(96):
        comment = b"\xff\xfe\x00\x0a" + f"{number:08}".encode()
        path = root / ("ant", "bee")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image[:2] + comment + image[2:])
    return root


class SlowPack:
    """A pack in a process group of its own, met when some shards are finished."""

    def __init__(
        self, source: Sequence[object], out: Path, *options: object, finished: int = 1
    ) -> None:
        self.work = out / ".pack"
        self._errors: list[str] = []
        before = len(self.done())
        self.process = subprocess.Popen(
            command_line("pack", *source, "--out", out, *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        try:
            wait_until(lambda: self._met(before + finished))
        except BaseException:
            self.kill()
            raise

    def done(self) -> list[str]:
        """Return the finished shards."""
        return sorted(path.stem for path in self.work.glob("*.rec.done"))

    def _met(self, finished: int) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        return len(self.done()) >= finished and any(self.work.glob("*.rec.tmp"))

    def workers(self) -> list[int]:
        """Return the processes that write shards."""
        parent = self.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [int(child) for child, command in commands.items() if b"spawn_main" in command]

    def wait(self) -> list[str]:
        """Wait until it and its workers have ended; return its errors."""
        if self.process.returncode is None:
            errors = self.process.communicate(timeout=30)[1].splitlines()
            self._errors = [line for line in errors if not line.startswith("packed ")]
        wait_until(lambda: not group_is_alive(self.process.pid))
        return self._errors

    def kill(self) -> None:
        """End the parent, as nothing can prevent, and see its workers end."""
        self.process.kill()
        self.wait()

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal; to the group as a terminal does."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


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
