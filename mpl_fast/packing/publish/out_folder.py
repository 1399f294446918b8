"""Output folder of a pack: file locks, the work folder `.pack`, and the final renames.

A run writes into the hidden folder `.pack` until the pack is complete. So an interrupted run can
continue, and an older pack stays readable until the new one replaces it.
"""

import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mpl_fast import locks
from mpl_fast.atomic import sync_folder
from mpl_fast.data.manifest import MANIFEST, file_names
from mpl_fast.errors import OutputError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.write.shard_receipt import receipt_path
from mpl_fast.untrusted import json_value

WORK = ".pack"
_LOCK = ".lock"
_OURS = re.compile(
    r"(train|train_label|train_unlabel|val)(-\d{5,}-of-\d{5,})?\.(rec|idx|lst)"
    rf"|classes\.txt|{re.escape(TABLE)}|{re.escape(MANIFEST)}"
)
_STOPS = (signal.SIGINT, signal.SIGTERM)


def is_pack_file(name: str) -> bool:
    """Return whether a pack may have a file of this name; never one in another folder."""
    return _OURS.fullmatch(name) is not None


@contextmanager
def open_out_folder(
    path: Path, *, shared: bool = False, lock: bool = True
) -> Iterator["OutFolder"]:
    """Lock a folder, made if missing, for this process or (shared) for all that pack its parts;
    without `lock`, the caller knows that no other process uses it.

    Leaving it after an error keeps finished shards and nothing else. After a publish Ctrl-C and
    SIGTERM are ignored until the context ends.
    """
    with ExitStack() as stack:
        try:
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            file = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error
        stack.callback(os.close, file)
        folder = OutFolder(path, file, stack, lock=lock)
        with output_errors(path):
            folder.lock(shared=shared)
            folder.require_no_links()
            folder.finish_publish(shared)
            folder.work.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            with _stops_ignored(), output_errors(path):
                if not shared:
                    folder.clean()
                    if created and {*path.iterdir()} == {path / _LOCK}:
                        shutil.rmtree(path)


class OutFolder:
    """A locked output folder: its pack, and the work folder in it."""

    def __init__(self, path: Path, file: int, stack: ExitStack, *, lock: bool) -> None:
        self.path = path
        self.work = path / WORK
        self._file = file
        self._lock = lock
        self._stack = stack  # of the context

    def require_no_links(self) -> None:
        """OutputError when a link is where this program writes: it never makes one there."""
        found = [self.work] if self.work.is_symlink() else [*self.work.glob("*")]
        if links := sorted(str(path) for path in found if path.is_symlink()):
            raise OutputError(f"{first_few(links)}: a link to elsewhere; remove {self.work}")

    def lock(self, *, shared: bool) -> None:
        """Lock the folder, or change its lock; OutputError when another process has it."""
        if self._lock and not locks.lock(self._file, self.path, shared=shared):
            raise OutputError(f"{self.path}: another make_rec is writing here")

    def pack_files(self) -> list[str]:
        """Return the names of all files of a pack in the folder, sorted."""
        return sorted(p.name for p in self.path.iterdir() if is_pack_file(p.name))

    def finished(self) -> list[str]:
        """Return the names of the finished shards in the work folder, sorted."""
        if not (self.work / TABLE).exists():
            return []  # left by a publish that was killed at its very end
        return sorted(path.stem for path in self.work.glob("*.rec.done"))

    def clear_work(self) -> None:
        """Delete an unfinished pack."""
        shutil.rmtree(self.work)
        self.work.mkdir()

    def require_space(self, needed: int) -> None:
        """Raise OutputError when fewer than `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"{self.path}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on this disk"
            )

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Yield whether no other part is being packed; if so, none can start within the context."""
        try:
            self.lock(shared=False)
            alone = True
        except OutputError:
            alone = False
        try:
            yield alone
        finally:
            self.lock(shared=True)

    @contextmanager
    def locked(self, name: str, busy: str | None = None) -> Iterator[None]:
        """Hold a named lock in the work folder; with `busy`, fail with it instead of waiting."""
        with (self.work / f"{name}.lock").open("a") as file:
            seconds = 0.0 if busy else math.inf
            if self._lock and not locks.lock(file, self.path, seconds=seconds):
                raise OutputError(f"{self.path}: {busy}")
            yield

    def publish(self) -> None:
        """Move the files of the work folder's manifest into the folder, the manifest last.

        An old manifest is removed first, so that no mixture of two packs looks complete. If this
        is killed, the next run into this folder finishes it.
        """
        self._stack.enter_context(_stops_ignored())
        self._publish()

    def _publish(self) -> None:
        manifest = self.work / MANIFEST
        try:
            names = file_names(json_value(manifest.read_text(encoding="utf-8")))
            wrong = [str(name) for name in names if not is_pack_file(name)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(f"{manifest}: damaged ({error}); remove {self.work}") from error
        if wrong:
            raise OutputError(f"{manifest}: damaged, names {first_few(wrong)}; remove {self.work}")
        old = self.pack_files()
        if MANIFEST in old:
            (self.path / MANIFEST).unlink()
        sync_folder(self.path)
        for name in names:
            if (self.work / name).exists():
                (self.work / name).replace(self.path / name)
        for name in set(old) - {*names, MANIFEST}:
            (self.path / name).unlink()
        sync_folder(self.path)
        (self.work / MANIFEST).replace(self.path / MANIFEST)
        sync_folder(self.path)
        shutil.rmtree(self.work)

    def finish_publish(self, shared: bool) -> None:
        """Finish a publish that was killed: only then the manifest is in the work folder."""
        if not (self.work / MANIFEST).exists():
            return
        if shared:
            raise OutputError(
                f"{self.path}: a finished pack was stopped during its final renames; "
                f"first run: make_rec.py finish {self.path}"
            )
        with _stops_ignored():
            self._publish()

    def clean(self) -> None:
        """Remove all but finished shards, their plan and unpacked tars, which the next run uses."""
        if not self.work.exists() or (self.work / MANIFEST).exists():
            return
        finished = self.finished()
        if not finished:
            shutil.rmtree(self.work)
            return
        kept = {TABLE, *finished, *(receipt_path(self.work, name).name for name in finished)}
        for path in self.work.iterdir():
            spool = path.match("spool-*") and path.suffix != ".tmp"
            if path.name not in kept and not spool:
                path.unlink()


@contextmanager
def _stops_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
