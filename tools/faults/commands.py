"""Faults of whole commands: signals, disks that fill, terminals that go, as a user has them.

Each is injected into a run that trains. Checked are its exit code, a line that it prints, what
tools/status.py has of it, and that it, or else the same command again, ends bit for bit as a run
without a fault.
"""

import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.training import status
from tests import tiny_run
from tools.faults.cases import Campaign, Case
from tools.faults.processes import descendants, ended, orphans, started
from tools.faults.training import POLL, differences, is_rank, lines

STEPS = 200
OPTIONS = ["--steps", str(STEPS), "--log-every", "1", "--eval-every", "40"]
OPTIONS += ["--checkpoint-every", "20"]
DISK = 32  # MB of the small disk
START_SECONDS = 0.25  # in which a rank begins
TIMES = 5  # of what once did not fail each time
RESTARTS = "--max-restarts=3"
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"  # of torchrun, see docs/cluster.md


class Running(NamedTuple):
    """A run in which a fault is injected."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    rec: Path
    terminal: int
    """The other end of its output, if that is a terminal."""

    @property
    def ranks(self) -> list[int]:
        """Processes that train."""
        return [pid for pid in descendants(self.process.pid) if is_rank(pid)] or [self.process.pid]

    @property
    def checkpoints(self) -> set[Path]:
        """Those of the run."""
        return {*self.folder.glob("checkpoints/step_0*")}

    def until(self, reached: Callable[[], bool] = lambda: False) -> None:
        """Waits for something, or for the end."""
        while self.process.poll() is None and not reached():
            time.sleep(POLL)

    def until_row(self, row: int) -> None:
        """Waits for a row of metrics.jsonl."""
        self.until(lambda: lines(self.folder / "metrics.jsonl") > row)


class Fault(NamedTuple):
    """A fault, and how a command ends then."""

    inject: Callable[[Running], None]
    code: int = 0
    prints: str = "done: top-1"
    """A regular expression; empty if nobody can read what it prints."""
    state: str = "complete"
    ranks: int = 1
    options: Sequence[str] = ()
    before: Sequence[str] = ()
    """The command."""
    launcher: Sequence[str] = ()
    """Options of torchrun."""
    output: str = "log"
    small_disk: bool = False
    resumes: bool = True
    """The same command again ends well."""
    at: int | None = 50
    """The row of metrics.jsonl after which it is injected; None: when a rank begins."""


def nothing(run: Running) -> None:
    """The fault is in the command."""


def send(*numbers: signal.Signals) -> Callable[[Running], None]:
    """Sends signals to what the user started."""

    def inject(run: Running) -> None:
        for number in numbers:
            run.process.send_signal(number)

    return inject


def to_rank(number: signal.Signals, rank: int = -1) -> Callable[[Running], None]:
    """Sends a signal to a process that torchrun started."""
    return lambda run: os.kill(run.ranks[rank], number)


def kill_soon(run: Running) -> None:
    """Kills torchrun while its ranks begin."""
    family = descendants(run.process.pid)
    time.sleep(random.random() * START_SECONDS)
    run.process.kill()
    if left := orphans(family):
        raise AssertionError(f"{len(left)} processes outlived torchrun")


def fill_twice(run: Running) -> None:
    """Fills the disk for a second, and again after the next checkpoint: two that fail in a row
    would end the run."""
    for _ in range(2):
        run.until_row(lines(run.folder / "metrics.jsonl") + random.randrange(20))
        with full_disk(run.folder):
            time.sleep(1.0)
        before = run.checkpoints
        run.until(lambda before=before: bool(run.checkpoints - before))  # type: ignore[misc]


def fill_for_good(run: Running) -> None:
    """Fills the disk until the run has ended."""
    with full_disk(run.folder):
        run.until()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Inside, a file of the user takes all of the disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"x" * size):
                    pass
    yield
    (folder / "filler").unlink()


def cut_records(run: Running) -> None:
    """Truncates the images until the run has ended."""
    contents = {file: file.read_bytes() for file in run.rec.glob("train*.rec")}
    for file in contents:
        os.truncate(file, 0)
    run.until()
    for file, content in contents.items():
        file.write_bytes(content)


def move_away(run: Running) -> None:
    """Renames the run directory."""
    run.folder.rename(run.folder.with_name("moved"))


def start_again(run: Running) -> None:
    """Starts the command a second time, which must be refused; the first does not end before."""
    run.process.send_signal(signal.SIGSTOP)
    done = subprocess.run(run.process.args, capture_output=True, text=True, check=False)
    run.process.send_signal(signal.SIGCONT)
    if done.returncode != 2 or "is in use by another run" not in done.stderr:
        raise AssertionError(f"a second run: {done.returncode}, {done.stderr}")


def hang_up(run: Running) -> None:
    """Closes the terminal."""
    os.close(run.terminal)


def copy_and_evaluate(run: Running) -> None:
    """Copies a checkpoint, and evaluates the run beside it all the time."""
    copy = run.folder / "checkpoints" / "step_best"

    def copied() -> bool:
        with contextlib.suppress(OSError):  # the run has removed it
            shutil.copytree(max(run.checkpoints), copy, dirs_exist_ok=True)
            return True
        return False

    run.until(copied)
    command = [sys.executable, str(tiny_run.ROOT / "tools" / "evaluate.py"), str(run.folder)]
    while run.process.poll() is None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssertionError(f"evaluate.py: {done.stderr}")
    if len([*copy.iterdir()]) != 3:
        raise AssertionError("the copy of a checkpoint is gone")


STOPPED = "stopped by a signal after step [0-9]+, saved: the same command resumes"
HUNG = "has made no progress for 2[0-9] s after step [0-9]+: its stack is in .*/hang/rank_0.txt"
OUTAGE = Fault(fill_twice, options=("--checkpoint-every", "50"), small_disk=True, at=10)
# Not even status.json can be written.
FULL = Fault(fill_for_good, 6, "cannot be written: No space left", "dead", small_disk=True)
STOP_AND_SAVE = partial(Fault, code=75, prints=STOPPED, state="stopped")
FAULTS: dict[str, Fault] = {
    "nothing": Fault(nothing),
    "SIGTERM": STOP_AND_SAVE(send(signal.SIGTERM)),
    "SIGTERM to torchrun": STOP_AND_SAVE(send(signal.SIGTERM), code=1, ranks=2),
    "SIGUSR1": STOP_AND_SAVE(send(signal.SIGUSR1)),
    "SIGHUP": STOP_AND_SAVE(send(signal.SIGHUP)),
    "SIGHUP to torchrun": STOP_AND_SAVE(send(signal.SIGHUP), code=1, ranks=2),
    "SIGHUP under nohup": Fault(send(signal.SIGHUP), before=("nohup",)),
    "SIGHUP to torchrun under nohup": Fault(
        send(signal.SIGHUP), ranks=2, before=("nohup",), launcher=(HANDLED,)
    ),
    "SIGUSR1 to torchrun": STOP_AND_SAVE(
        send(signal.SIGUSR1), code=1, ranks=2, launcher=(f"{HANDLED},SIGUSR1",)
    ),
    "Ctrl-C": STOP_AND_SAVE(send(signal.SIGINT)),
    "Ctrl-C, twice at once": STOP_AND_SAVE(send(signal.SIGINT, signal.SIGINT)),
    "SIGKILL": Fault(send(signal.SIGKILL), -9, "", "dead"),
    "SIGKILL of torchrun": Fault(send(signal.SIGKILL), -9, "", "dead", 2),
    "SIGKILL of a rank": Fault(
        to_rank(signal.SIGKILL), 1, "Signal 9 .SIGKILL. received", "failed", 2
    ),
    "SIGABRT of the first rank": Fault(
        to_rank(signal.SIGABRT, 0), 1, "Signal 6 .SIGABRT. received", "dead", 2
    ),
    "SIGSTOP of a rank": Fault(
        to_rank(signal.SIGSTOP), 1, HUNG, "failed", 2, ("--hang-timeout", "20")
    ),
    "SIGSTOP of a rank that is restarted": Fault(
        to_rank(signal.SIGSTOP),
        ranks=2,
        options=("--hang-timeout", "20"),
        launcher=(RESTARTS,),
    ),
    "a disk that is full for a second": OUTAGE,
    "a disk that is full for a second, two ranks": OUTAGE._replace(ranks=2),
    "a disk that stays full": FULL,
    "a disk that stays full, two ranks": FULL._replace(code=1, ranks=2),
    "records that are cut short": Fault(
        cut_records, 4, "DALI cannot read a record or decode an image", "failed"
    ),
    "a learning rate that diverges": Fault(
        nothing,
        5,
        "error: not finite: the last 10 updates of the teacher up to step",
        "failed",
        options=("--algorithm.teacher.lr", "1e30"),
        resumes=False,
    ),
    "a run directory that is moved away": Fault(
        move_away, 6, "cannot be written: No such file or directory", ""
    ),
    "a second run in the directory": Fault(start_again),
    "output to head": Fault(
        nothing, prints="mpl on", before=("bash", "-o", "pipefail", "-c", '"$@" | head -1', "bash")
    ),
    "output to a full disk": Fault(nothing, prints="", output="/dev/full"),
    "a terminal that is closed": Fault(hang_up, 75, "", "stopped", output="terminal"),
    "a terminal that is closed, without SIGHUP": Fault(
        hang_up, prints="", output="terminal", before=("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    ),
    "a copy of a checkpoint, and evaluations": Fault(
        copy_and_evaluate, options=("--checkpoint-every", "1")
    ),
}
BEGINNING = Fault(kill_soon, -9, "", "", 2, at=None)
RESTARTED = Fault(to_rank(signal.SIGKILL), ranks=2, launcher=(RESTARTS,))
FAULTS |= {f"SIGKILL of torchrun as ranks begin, {n}": BEGINNING for n in range(TIMES)}
FAULTS |= {f"SIGKILL of a rank that is restarted, {n}": RESTARTED for n in range(TIMES)}


def run_commands(campaign: Campaign, rec: Path) -> None:
    """The faults that are missing."""
    for name, fault in FAULTS.items():
        campaign.run(f"command: {name}", partial(one_case, campaign.out, rec, name, fault))


def one_case(out: Path, rec: Path, name: str, fault: Fault) -> Case:
    """Injects a fault into a run, and has it end."""
    began = time.monotonic()
    make = partial(Case, f"command: {name}", "commands")
    if fault.small_disk and os.geteuid() != 0:
        return make("skipped", reason="needs root, for a disk of its own")
    place = out / "runs" / re.sub(r"\W+", "_", name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with small_disk(place) if fault.small_disk else contextlib.nullcontext():
        faults, about = found(place, reference(out, rec, fault.ranks), rec, fault)
        if not faults or fault.small_disk:
            shutil.rmtree(place, ignore_errors=fault.small_disk)
    seconds = time.monotonic() - began
    return make("failed" if faults else "passed", seconds, 0, "; ".join(faults), about)


def found(place: Path, expected: Path, rec: Path, fault: Fault) -> tuple[list[str], dict[str, Any]]:
    """What is wrong, and what was seen."""
    folder, log, faults = place / "run", place.with_suffix(".log"), list[str]()
    log.unlink(missing_ok=True)
    command = command_of(folder, rec, fault)
    run = running(command, folder, rec, log, fault)
    if fault.at is None:
        run.until(lambda: any(map(is_rank, descendants(run.process.pid))))
    else:
        run.until_row(fault.at)
    family = descendants(run.process.pid)
    try:
        fault.inject(run)
    except AssertionError as error:
        faults.append(str(error))
    code = ended(run.process)
    if left := orphans(family):
        faults.append(f"{len(left)} processes are left")
    printed = log.read_text(errors="replace") if log.exists() else ""
    seen = re.search(f".*{fault.prints}.*", printed)
    now = status.read(folder) if (folder / "config.yaml").exists() else None
    about = {
        "code": code,
        "line": seen[0] if seen else "",
        "status": " | ".join(now.cells()) if now else "",
        "checkpoint": max(run.checkpoints).name if run.checkpoints else "",
    }
    if code != fault.code:
        faults.append(f"the command ended with {code}, not {fault.code}")
    if not seen:
        faults.append(f"it has not printed {fault.prints}")
    if fault.state and (now is None or now.state != fault.state):
        faults.append(f"its status is {now.state if now else 'none'}, not {fault.state}")
    if code != 0 and fault.resumes:
        command = command_of(folder, rec, Fault(nothing, ranks=fault.ranks))
        again = ended(started(command, log, tiny_run.environment()))
        if again != 0:
            faults.append(f"the same command again ended with {again}")
    if not faults and fault.resumes:
        faults = differences(expected, folder, steps=STEPS)
    return faults, about


def running(command: list[str], folder: Path, rec: Path, log: Path, fault: Fault) -> Running:
    """Starts a command with its output where the fault has it."""
    if fault.output != "terminal":
        log = log if fault.output == "log" else Path(fault.output)
        return Running(started(command, log, tiny_run.environment()), folder, rec, -1)
    terminal, other = os.openpty()
    process = subprocess.Popen(
        command,
        stdin=other,
        stdout=other,
        stderr=other,
        env=tiny_run.environment(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its end is then a SIGHUP
    )
    os.close(other)
    return Running(process, folder, rec, terminal)


def command_of(folder: Path, rec: Path, fault: Fault) -> list[str]:
    """What a user types."""
    command = tiny_run.command(
        [*tiny_run.arguments(folder, rec), *OPTIONS, *fault.options], fault.ranks
    )
    at = command.index("--standalone") if fault.launcher else 0
    return [*fault.before, *command[:at], *fault.launcher, *command[at:]]


def reference(out: Path, rec: Path, ranks: int) -> Path:
    """The run without a fault, trained once."""
    folder = out / "references" / f"commands_{ranks}" / "run"
    if not (folder / "summary.json").exists():
        command = command_of(folder, rec, Fault(nothing, ranks=ranks))
        if code := ended(started(command, folder.parent / "log", tiny_run.environment())):
            raise RuntimeError(f"the run without a fault ended with {code}: {folder.parent}/log")
    return folder


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mounts a small disk in memory."""
    options = ["-t", "tmpfs", "-o", f"size={DISK}m", "none", str(folder)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
