"""Output folder of a pack: file locks, the work folder `.pack`, and the final renames.

A run writes into the hidden folder `.pack` until the pack is complete. So an interrupted run can
continue, and an older pack stays readable until the new one replaces it.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from mpl_fast.atomic import sync_folder
from mpl_fast.data.manifest import MANIFEST, file_names
from mpl_fast.errors import OutputError, output_errors
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.write.shard_receipt import receipt_path

WORK = ".pack"
_LOCK = ".lock"
_OURS = re.compile(
    r"(train|train_label|train_unlabel|val)(-\d{5,}-of-\d{5,})?\.(rec|idx|lst)"
    rf"|classes\.txt|{re.escape(TABLE)}|{re.escape(MANIFEST)}"
)
_STOPS = (signal.SIGINT, signal.SIGTERM)


class OutFolder:
    """Context manager: a folder locked by this process, or (shared) by those that pack its parts.

    Leaving it after an error keeps finished shards and nothing else. During the final renames
    Ctrl-C and SIGTERM are ignored, until the context ends.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self.work = path / WORK
        self._shared = shared
        self._created = False
        self._lock = -1
        self._stops = ExitStack()

    def __enter__(self) -> "OutFolder":
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
            how = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
            fcntl.flock(self._lock, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(f"{self.path}: another make_rec is writing here") from error
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        with output_errors(self.path):
            if not self._shared:
                self._finish_publish()
            elif (self.work / MANIFEST).exists():
                os.close(self._lock)
                raise OutputError(
                    f"{self.path}: a finished pack was stopped during its final renames; "
                    f"first run: make_rec.py finish {self.path}"
                )
            self.work.mkdir(exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stops, _stops_ignored(), output_errors(self.path):
            try:
                if not self._shared:
                    self._clean()
                    if error is not None and self._created and self._names() == [_LOCK]:
                        shutil.rmtree(self.path)
            finally:
                os.close(self._lock)

    def pack_files(self) -> list[str]:
        """Return the names of all files of a pack in the folder, sorted."""
        return [name for name in self._names() if _OURS.fullmatch(name)]

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
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        try:
            yield alone
        finally:
            self._share()

    def _share(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.path}: another make_rec is writing here") from error

    @contextmanager
    def locked(self, name: str, busy: str | None = None) -> Iterator[None]:
        """Hold a named lock in the work folder; with `busy`, fail with it instead of waiting."""
        with (self.work / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError as error:
                raise OutputError(f"{self.path}: {busy}") from error
            yield

    def publish(self) -> None:
        """Move the files of the work folder's manifest into the folder, the manifest last.

        An old manifest is removed first, so that no mixture of two packs looks complete. If this
        is killed, the next run into this folder finishes it.
        """
        self._stops.enter_context(_stops_ignored())
        self._publish()

    def _publish(self) -> None:
        names = file_names(json.loads((self.work / MANIFEST).read_text(encoding="utf-8")))
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

    def _finish_publish(self) -> None:
        """Finish a publish that was killed: only then the manifest is in the work folder."""
        if (self.work / MANIFEST).exists():
            with _stops_ignored():
                self._publish()

    def _clean(self) -> None:
        """Remove all but finished shards, their plan and unpacked tars, which the next run uses."""
        if not self.work.exists() or (self.work / MANIFEST).exists():
            return
        finished = self.finished()
        if not finished:
            shutil.rmtree(self.work)
            return
        kept = {TABLE, *finished, *(receipt_path(self.work, name).name for name in finished)}
        for path in self.work.iterdir():
            if path.name not in kept and not path.match("spool-*.tar"):
                path.unlink()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


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
