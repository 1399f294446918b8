"""The output side of a shard: buffers that are filled in place while a thread writes full ones.

Large direct writes skip the page cache: no second copy of the data, and no stalls when the kernel
decides to write dirty pages back. Where a file system has no direct writes they are buffered ones.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

BUFFER = 8 << 20  # bytes written at a time
_RING = 3  # buffers: one is filled, perhaps across the border to the next, one is written
_BLOCK = 4096  # bytes; direct writes are whole blocks


class ShardWriter:
    """A new file, written from first byte to last; a failed write raises OSError soon after."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        self._direct = _set_direct(self._file, True)
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(_RING)]
        self._uses: list[tuple[Future[None], ...]] = [()] * _RING
        # A thread each: while the disk takes a buffer the processor can digest the next.
        self._writes = ThreadPoolExecutor(1)
        self._digests = ThreadPoolExecutor(1)
        self._digest = hashlib.sha256()
        self.position = 0
        """Bytes of the file so far: what is written next begins here."""

    def fits(self, size: int) -> bool:
        """Tell whether the next `size` bytes can be filled in place, before any is written."""
        return (self.position + size) // BUFFER - self.position // BUFFER < _RING

    def room(self, start: int, size: int) -> list[memoryview]:
        """Return bytes start to start + size of the file, to be filled: one view a buffer.

        They must begin at `position` or later, within what fits. They are written only when
        `advance` moves the position past them.
        """
        views = []
        while size:
            number, at = divmod(start, BUFFER)
            view = self._free_buffer(number)[at : at + size]
            views.append(view)
            start += len(view)
            size -= len(view)
        return views

    def put(self, start: int, content: "bytes | memoryview") -> None:
        """Fill the bytes from start on with content, as room says."""
        at = 0
        for view in self.room(start, len(content)):
            view[:] = content[at : at + len(view)]
            at += len(view)

    def advance(self, size: int) -> None:
        """Have the next `size` bytes, which have been filled, written."""
        first = self.position // BUFFER
        self.position += size
        for number in range(first, self.position // BUFFER):
            self._hand_over(number, BUFFER)

    def append(self, content: bytes) -> None:
        """Write content of any length next."""
        rest = memoryview(content)
        while rest:
            piece = rest[: BUFFER - self.position % BUFFER]
            self.put(self.position, piece)
            self.advance(len(piece))
            rest = rest[len(piece) :]

    def finish(self) -> str:
        """Write the rest, wait until all is on disk, and return the sha256 of the file."""
        number, size = divmod(self.position, BUFFER)
        self._hand_over(number, size)
        for last in range(number, number + _RING):
            self._free_buffer(last)
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop, finished or not."""
        for threads in (self._writes, self._digests):
            threads.shutdown(cancel_futures=True)
        os.close(self._file)

    def _free_buffer(self, number: int) -> memoryview:
        """Return the buffer for the file's number-th part, once its last content is written."""
        for use in self._uses[number % _RING]:
            use.result()
        self._uses[number % _RING] = ()
        return self._buffers[number % _RING]

    def _hand_over(self, number: int, size: int) -> None:
        for use in chain(*self._uses):
            if use.done():
                use.result()  # a full disk is told at once
        content = self._free_buffer(number)[:size]
        self._uses[number % _RING] = (
            self._writes.submit(self._write, number, size),
            self._digests.submit(self._digest.update, content),
        )

    def _write(self, number: int, size: int) -> None:
        view = self._buffers[number % _RING][: size + -size % _BLOCK]  # finish cuts off the rest
        offset = number * BUFFER
        while view:
            try:
                written = os.pwrite(self._file, view, offset)
            except OSError as error:
                if not self._direct or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                self._direct = _set_direct(self._file, False)
                continue
            view = view[written:]
            offset += written


def _set_direct(file: int, direct: bool) -> bool:
    """Turn direct writing on or off; return whether it is on now."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        return False
    return direct
