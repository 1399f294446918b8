"""Locks between processes, and every command on a file system that has none."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.pruners import NopPruner

from mpl_fast import locks
from mpl_fast.config import RunConfig
from mpl_fast.errors import OutputError
from mpl_fast.inference.parts import Parts
from mpl_fast.packing.publish.out_folder import open_out_folder
from mpl_fast.sweep.study import Storage, Trials
from mpl_fast.training.run_dir import RunDir
from tests.packing.packs import image_tree, refuse, run, run_process
from tests.test_untrusted import SOURCES

HOW = ("--labeled", 6, "--quiet")


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As of Lustre mounted without flock; the reason in words."""
    reason = os.strerror(number := getattr(errno, request.param))

    def flock(file: object, operation: int) -> None:
        raise OSError(number, reason)

    monkeypatch.setattr("fcntl.flock", flock)
    return reason


def train(folder: Path, lock: bool) -> None:
    RunDir(replace(RunConfig(run_dir=str(folder)), lock=lock)).close()


def predict(folder: Path, lock: bool) -> None:
    with Parts(folder, lock=lock) as parts:
        parts.open({}, 1, batch=1, part=1, anew=False)


def sweep(folder: Path, lock: bool) -> None:
    """Each trial is this worker's once."""
    folder.mkdir(exist_ok=True)
    trials = Trials(folder, Storage("journal"), NopPruner(), 3, lock=lock)
    with trials.locked():
        trials.open({}, {}, lambda: None, {})
    claims = [trials.claim(2) for _ in range(3)]
    assert [claim and claim.trial.number for claim in claims] == [0, 1, None]
    assert claims[0]
    claims[0].lock.close()  # stopped after saving
    again = trials.claim(2)
    assert again and again.again and again.trial.number == 0


def pack(folder: Path, lock: bool) -> None:
    with open_out_folder(folder, lock=lock) as out, out.locked("plan"):
        pass


@pytest.mark.parametrize("use", [train, predict, sweep, pack])
def test_a_file_system_without_locks_is_named_and_can_be_used(
    use: Callable[[Path, bool], None], without_locks: str, tmp_path: Path
) -> None:
    """It is not "in use by another process"."""
    folder = tmp_path / "folder"
    line = f"^{folder} cannot be locked: {without_locks}: mount .* give --lock false$"
    with pytest.raises(OutputError, match=line):
        use(folder, True)
    use(folder, False)


def test_make_rec_without_locks(without_locks: str, tmp_path: Path) -> None:
    """Parts, one after the other, and what changes a pack."""
    tree, out = image_tree(tmp_path), tmp_path / "rec"
    common = ("--src", tree / "train", "--val", tree / "val", *HOW, "--shards", 2, "--out", out)
    off = ("--lock", "false")
    line = f"{out} cannot be locked: {without_locks}: "
    assert line in refuse(*common, status=3)
    for part in ("1/2", "2/2"):
        assert line in refuse(*common, "--part", part, status=3)
        run("pack", *common, "--part", part, *off)
    for command, more in (("finish", ()), ("resplit", ("--labeled", 9))):
        assert line in refuse(out, *more, command=command, status=3)
        run(command, out, *more, *off)
    run("verify", out)
    assert "x is neither true nor false" in refuse(*common, "--lock", "x", status=2)


PRELOADED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
typedef int (*call)(int, int, ...);
static int without(const char *name, int file, int command, void *more) {
  int locks = command == F_SETLK || command == F_SETLKW || command == F_GETLK;
  if (locks) errno = ENOSYS;
  return locks ? -1 : ((call)dlsym(RTLD_NEXT, name))(file, command, more);
}
#define DEFINE(name) int name(int file, int command, ...) { \\
  va_list list; va_start(list, command); void *more = va_arg(list, void *); va_end(list); \\
  return without(#name, file, command, more); }
DEFINE(fcntl)
DEFINE(fcntl64)
int flock(int file, int operation) { errno = ENOSYS; return -1; }
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_sqlite_needs_no_locks_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which flock is only one kind."""
    library = tmp_path / "without.so"
    compiled = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(compiled, input=PRELOADED, text=True, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    tree = image_tree(tmp_path)
    command = ("pack", "--src", tree / "train", *HOW, "--out", tmp_path / "rec", "-j", 1)
    assert "cannot be locked" in run_process(*command, status=3).stderr
    run_process(*command, "--lock", "false")


def test_another_process_has_a_lock(tmp_path: Path) -> None:
    """Shared ones go together; a lock ends with its file."""
    file = tmp_path / "lock"
    with file.open("a") as one, file.open("a") as two:
        assert locks.lock(one, tmp_path, shared=True) and locks.lock(two, tmp_path, shared=True)
        assert not locks.lock(two, tmp_path) and not locks.lock(two, tmp_path, seconds=0.1)
        one.close()
        assert locks.lock(two, tmp_path, seconds=60)


def test_locks_are_in_one_place() -> None:
    """Elsewhere an error of the file system would be taken for another process."""
    found = [path.name for path in SOURCES if "fcntl.flock" in path.read_text()]
    assert found == ["locks.py"]
