"""The folder that a pack is written into: locked, and never showing a half-written file."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from mpl_fast.data.manifest import MANIFEST, file_names
from mpl_fast.errors import OutputError, output_errors

_PACK_FILE = (
    r"(train_label|train_unlabel|val)(-\d{5,}-of-\d{5,})?\.(rec|idx|lst)"
    r"|classes\.txt|manifest\.json"
)
_OURS = re.compile(_PACK_FILE)
_TEMPORARY = re.compile(rf"\.({_PACK_FILE}|spool-\d+)(\.tmp)")
_STOPS = (signal.SIGINT, signal.SIGTERM)


class OutFolder:
    """A folder held by this process alone; leaving the context removes every temporary file.

    From publish on, Ctrl-C and SIGTERM come too late: they are ignored to the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._created = False
        self._publishing = False
        self._lock = -1
        self._stops = ExitStack()

    def __enter__(self) -> "OutFolder":
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(f"{self.path}: another make_rec is writing here") from error
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        with output_errors(self.path):
            self._finish_publish()
            self._remove_temporary()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stops, _stops_ignored(), output_errors(self.path):
            if not self._publishing:
                self._remove_temporary()
            if error is not None and self._created and self._names() == [".lock"]:
                shutil.rmtree(self.path)
            os.close(self._lock)

    def holdings(self) -> list[str]:
        """Return the names of the pack files that are here, sorted."""
        return [name for name in self._names() if _OURS.fullmatch(name)]

    def require_space(self, needed: int) -> None:
        """Raise OutputError when fewer than `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"{self.path}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on this disk"
            )

    def temporary(self, name: str) -> Path:
        """Return the hidden path under which a file is written before it gets its name."""
        return self.path / f".{name}.tmp"

    def write_text(self, name: str, text: str) -> str:
        """Write text as the temporary file of name, on disk; return its sha256."""
        content = text.encode("utf-8", "surrogateescape")
        with self.temporary(name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return hashlib.sha256(content).hexdigest()

    def publish(self, names: Sequence[str]) -> None:
        """Give the files of names, and last the manifest, their names, in place of an old pack.

        An old manifest goes first, so that no mixture of two packs ever looks complete. A publish
        that is cut short keeps its temporary files: the next run into this folder finishes it.
        """
        self._stops.enter_context(_stops_ignored())
        self._publish(names, names)

    def _finish_publish(self) -> None:
        """Finish a publish that was cut short: then only the manifest's temporary file is there."""
        if MANIFEST in self._names():
            return
        try:
            names = file_names(json.loads(self.temporary(MANIFEST).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # none, or cut short itself: nothing was renamed
            return
        waiting = [name for name in names if self.temporary(name).exists()]
        if {*waiting, *self.holdings()} >= set(names):
            with _stops_ignored():
                self._publish(names, waiting)

    def _publish(self, names: Sequence[str], waiting: Sequence[str]) -> None:
        """Rename the files that are waiting, and remove every pack file that is not in names."""
        self._publishing = True
        old = self.holdings()
        if MANIFEST in old:
            (self.path / MANIFEST).unlink()
        self._sync()
        for name in waiting:
            self.temporary(name).replace(self.path / name)
        for name in set(old) - {*names, MANIFEST}:
            (self.path / name).unlink()
        self._sync()
        self.temporary(MANIFEST).replace(self.path / MANIFEST)
        self._sync()
        self._publishing = False

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def _remove_temporary(self) -> None:
        for name in self._names():
            if _TEMPORARY.fullmatch(name):
                (self.path / name).unlink()

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _stops_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever stopped by them
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
