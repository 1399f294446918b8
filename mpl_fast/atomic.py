"""Atomic file writes (temporary name, fsync, rename, fsync of the folder), and sha256 of files.

After a crash or a power cut a file has either its old content or all of the new one. Functions
raise OSError; `errors.output_errors` turns it into one line for the user.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BLOCK = 4 << 20  # bytes hashed at a time
_BUFFER = 1 << 20  # bytes collected before a write
SYNC_EVERY = 64 << 20  # bytes, for a caller that wants to know what has reached the disk
_SYNCS = 8  # files that are synced at once
Synced = Callable[[], None]
# Some network file systems cannot sync a folder, and some folders are not readable.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class HashedFile(io.BufferedWriter):
    """A new binary file that is hashed while it is written: nothing is read back.

    With `synced`, it is also synced every `SYNC_EVERY` bytes, and `synced` is called.
    """

    def __init__(self, path: Path, synced: Synced | None = None) -> None:
        self._hashing = _HashingFile(path, synced)
        super().__init__(self._hashing, _BUFFER)

    @property
    def size(self) -> int:
        """Bytes written, without those not flushed yet."""
        return self._hashing.size

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes written, without those not flushed yet."""
        return self._hashing.digest.hexdigest()

    @property
    def error(self) -> OSError | None:
        """The write that failed; a library may have replaced it by an error of its own."""
        return self._hashing.error


class _HashingFile(io.FileIO):
    def __init__(self, path: Path, synced: Synced | None) -> None:
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()
        self.size = self._synced_size = 0
        self.error: OSError | None = None
        self._synced = synced

    def write(self, block: "ReadableBuffer", /) -> int:
        try:
            written = super().write(block)
            self._sync(self.size + written)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(memoryview(block)[:written])
        self.size += written
        return written

    def _sync(self, size: int) -> None:
        if self._synced is not None and size - self._synced_size >= SYNC_EVERY:
            os.fsync(self.fileno())
            self._synced_size = size
            self._synced()


@contextmanager
def atomic_path(path: Path, temporary: Path | None = None, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path; the file written there is synced and renamed to `path`.

    After an error `path` is as it was, and the temporary file is removed. `temporary`: in place of
    ``NAME.tmp``, where that could be a file of the user or of another process; it may exist.
    Without `sync` a power cut may lose it, unless `sync_files` follows.
    """
    if temporary is None:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)  # left by a kill; a link would lead out of the folder
    try:
        yield temporary
        if sync:
            _sync_file(temporary)
        temporary.replace(path)
        if sync:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(
    path: Path, synced: Synced | None = None, *, sync: bool = True
) -> Iterator[HashedFile]:
    """Open a file that appears as `path` when it is complete; its sha256 is valid after that.

    `sync` is that of `atomic_path`.
    """
    with atomic_path(path, sync=sync) as temporary, HashedFile(temporary, synced) as file:
        try:
            yield file
        except Exception:
            if file.error is not None:
                raise file.error from None
            raise


def write_bytes(path: Path, content: bytes) -> str:
    """Write a whole file; return its sha256."""
    with atomic_file(path) as file:
        file.write(content)
    return file.sha256


def write_text(path: Path, text: str) -> str:
    """Write a whole text file, UTF-8 with file names as they are; return its sha256."""
    return write_bytes(path, text.encode("utf-8", "surrogateescape"))


def replace_text(path: Path, text: str) -> None:
    """Replace a text file that will soon be replaced again: at once, without waiting for the disk.

    After a power cut it may be empty.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # as in `atomic_path`
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> str:
    """Write a whole JSON file, indented; return its sha256."""
    return write_text(path, json.dumps(value, indent=1) + "\n")


def sync_files(paths: Sequence[Path]) -> None:
    """Wait until files and their names are on disk; of several at once a disk takes less time."""
    with ThreadPoolExecutor(_SYNCS) as threads:
        for _ in threads.map(_sync_file, paths):
            pass
    for folder in {path.parent for path in paths}:
        sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until what was created, renamed and removed in a folder is on disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sha256_of(path: Path, progress: Callable[[int], None] = lambda size: None) -> str:
    """Return the sha256 of a file; `progress` is called with the bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
