"""Writes a shard from a ring of buffers, filled in place while a thread writes full ones.

Large O_DIRECT writes bypass the page cache: no second copy of the data, and no stalls when the
kernel writes dirty pages back. File systems without O_DIRECT get buffered writes. Buffers are of
huge pages where the kernel has them: a disk request has a limited number of pages.
"""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

BUFFER = 8 << 20  # bytes written at a time
_RING = 3  # buffers: one being filled, perhaps on into the next, one being written
_BLOCK = 4096  # bytes; direct writes are whole blocks
# Of closed writers, for the next shards of this process: new pages take longer than their content.
_spare: list[list[memoryview]] = []


class ShardWriter:
    """A new file, written sequentially; a failed write raises OSError in one of the next calls."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        self._direct = _set_direct(self._file, True)
        self._buffers = _spare.pop() if _spare else [_buffer() for _ in range(_RING)]
        self._uses: list[Future[None] | None] = [None] * _RING
        self._writes = ThreadPoolExecutor(1)
        self.position = 0
        """Offset in the file of what is written next."""

    def fits(self, size: int) -> bool:
        """Return whether the next `size` bytes fit into the ring, to be filled in place."""
        return (self.position + size) // BUFFER - self.position // BUFFER < _RING

    def room(self, start: int, size: int) -> list[memoryview]:
        """Return writable views of the file's bytes start to start + size, one per buffer.

        They must start at `position` or later, within what fits. They are written when `advance`
        moves the position past them.
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
        """Copy content to the file's bytes from start on, within the same limits as room."""
        number, first = divmod(start, BUFFER)
        if first + len(content) <= BUFFER:  # as nearly always: then this takes a third of the time
            self._free_buffer(number)[first : first + len(content)] = content
            return
        at = 0
        for view in self.room(start, len(content)):
            view[:] = content[at : at + len(view)]
            at += len(view)

    def advance(self, size: int) -> None:
        """Move the position past the next `size` bytes, which are filled; write full buffers."""
        first = self.position // BUFFER
        self.position += size
        for number in range(first, self.position // BUFFER):
            self._hand_over(number, BUFFER)

    def append(self, content: bytes) -> None:
        """Write content of any length at the position."""
        rest = memoryview(content)
        while rest:
            piece = rest[:BUFFER]
            self.put(self.position, piece)
            self.advance(len(piece))
            rest = rest[len(piece) :]

    def finish(self) -> None:
        """Write the last buffer, and wait until the file is on disk."""
        number, size = divmod(self.position, BUFFER)
        self._hand_over(number, size)
        for last in range(number, number + _RING):
            self._free_buffer(last)
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._writes.shutdown(cancel_futures=True)
        os.close(self._file)  # raises a second time, before two writers would have these buffers
        _spare.append(self._buffers)

    def _free_buffer(self, number: int) -> memoryview:
        """Return the buffer of the file's number-th block, once its previous content is written."""
        if use := self._uses[number % _RING]:
            use.result()
            self._uses[number % _RING] = None
        return self._buffers[number % _RING]

    def _hand_over(self, number: int, size: int) -> None:
        for use in self._uses:
            if use and use.done():
                use.result()  # raises, for example when the disk is full
        self._free_buffer(number)
        self._uses[number % _RING] = self._writes.submit(self._write, number, size)

    def _write(self, number: int, size: int) -> None:
        view = self._buffers[number % _RING][: size + -size % _BLOCK]  # finish truncates the file
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


def _buffer() -> memoryview:
    pages = mmap.mmap(-1, BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def _set_direct(file: int, direct: bool) -> bool:
    """Switch O_DIRECT on or off; return whether it is on now."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        return False
    return direct
