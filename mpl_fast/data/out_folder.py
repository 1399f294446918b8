"""The folder that a pack is written into: locked, and never showing a half-written file."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import UserError

_PACK_FILE = (
    r"(train_label|train_unlabel|val)(-\d{5}-of-\d{5})?\.(rec|idx|lst)"
    r"|classes\.txt|manifest\.json"
)
_OURS = re.compile(_PACK_FILE)
_TEMPORARY = re.compile(rf"\.({_PACK_FILE}|spool-\d+)(\.tmp)")


class OutputError(UserError):
    """The output cannot be written: no space, no permission, in use, or taken."""

    exit_code = 3


class OutFolder:
    """A folder held by this process alone; leaving the context removes every temporary file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._created = not path.exists()
        self._lock = -1

    def __enter__(self) -> "OutFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(f"{self.path}: another make_rec is writing here") from error
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        self._remove_temporary()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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

        An old manifest goes first, so that no mixture of two packs ever looks complete.
        """
        old = self.holdings()
        if MANIFEST in old:
            (self.path / MANIFEST).unlink()
        self._sync()
        for name in names:
            self.temporary(name).replace(self.path / name)
        for name in set(old) - {*names, MANIFEST}:
            (self.path / name).unlink()
        self._sync()
        self.temporary(MANIFEST).replace(self.path / MANIFEST)
        self._sync()

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
