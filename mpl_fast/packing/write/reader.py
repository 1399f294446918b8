"""Reads the images of a shard from byte ranges of files; a file changed since planning is an error.

Files are opened ahead of their use, and the kernel is advised of each byte range (posix_fadvise),
so that a disk or network has many requests in flight.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.plan.table import RecordRow, SourceRow, image_key, origin_of
from mpl_fast.packing.sources.kinds import DECODERS
from mpl_fast.packing.sources.source import FOLDER, IN_SHARD, SHARDS

_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_BATCH = 8  # records that are opened together
# Seconds a file, in the page cache less: then the hand-over to a thread and back takes longer.
_SLOW = 50e-6
_CHANGED = "changed while it was being packed (or since it was planned); pack again"


class OpenedRecord(NamedTuple):
    """A record whose file is open; the kernel may already read it ahead."""

    record: RecordRow
    source: SourceRow
    file: int  # descriptor


class Reader:
    """Reads the records of one shard in order; `classes` are used in error messages only."""

    def __init__(self, sources: Sequence[SourceRow], classes: list[str], threads: int) -> None:
        self._sources = {source.number: source for source in sources}
        self._classes = classes
        self._threads = ThreadPoolExecutor(threads) if threads else None
        self._batches_ahead = threads + 1
        self._slow = False  # whether the last batch took long to open
        self._shared: dict[int, int] = {}  # source number to descriptor
        self._own: set[int] = set()  # descriptors of files that are opened for one image

    def opened(self, records: Iterable[RecordRow]) -> Iterator[OpenedRecord]:
        """Yield the records in order; a file of one image is closed before the next is yielded."""
        rows = iter(records)
        batches: deque[Callable[[], list[OpenedRecord]]] = deque()
        while True:
            while len(batches) < self._batches_ahead and (batch := list(islice(rows, _BATCH))):
                batches.append(self._open_ahead(batch))
            if not batches:
                return
            for opened in batches.popleft()():
                yield opened
                if opened.file in self._own:
                    self._own.remove(opened.file)
                    os.close(opened.file)

    def fill(self, opened: OpenedRecord, views: list[memoryview]) -> None:
        """Read the image of a record into views, whose total size is the image's."""
        record = opened.record
        start = max(0, record.start)
        whole = True
        try:
            for view in views:
                whole = whole and _read(opened.file, view, start)
                start += len(view)
            if record.start < 0:
                stat = os.fstat(opened.file)
                whole = whole and (stat.st_size, stat.st_mtime_ns) == (record.size, record.stamp)
            elif opened.source.kind == SHARDS:
                whole = whole and os.fstat(opened.file).st_mtime_ns == record.stamp
        except OSError as error:
            raise DataError(f"{self._name(opened)}: {error.strerror}") from error
        if not whole:
            raise DataError(f"{self._name(opened)} {_CHANGED}")

    def image(self, opened: OpenedRecord) -> bytes:
        """Return the image of a record, as the kind of its source decodes it."""
        decode, behind = DECODERS.get(opened.source.kind, (bytes, 0))
        buffer = bytearray(opened.record.size + behind)
        self.fill(opened, [memoryview(buffer)])
        try:
            return decode(bytes(buffer))
        except DataError as error:
            raise DataError(f"{self._name(opened)}: {error}") from error

    def require_unchanged(self) -> None:
        """DataError when a file of many images changed since planning."""
        for number, file in self._shared.items():
            self._check_shared(self._sources[number], file)

    def close(self) -> None:
        """Close every file."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for file in (*self._shared.values(), *self._own):
            os.close(file)

    def _open_ahead(self, batch: list[RecordRow]) -> Callable[[], list[OpenedRecord]]:
        """Start to open the files of a batch; return a function that waits for them."""
        for number in {record.source for record in batch}:
            source = self._sources[number]
            if source.kind not in (FOLDER, SHARDS) and number not in self._shared:
                try:
                    self._shared[number] = os.open(source.file, _FLAGS)
                except OSError as error:
                    raise _lost(source.spec, source.file, error) from error
                self._check_shared(source, self._shared[number])
        if self._threads and self._slow:
            return self._threads.submit(self._open_batch, batch).result
        opened = self._open_batch(batch)
        return lambda: opened

    def _open_batch(self, batch: list[RecordRow]) -> list[OpenedRecord]:
        result, began = [], time.perf_counter()
        for record in batch:
            source = self._sources[record.source]
            if source.kind in (FOLDER, SHARDS):
                path = record.path
                if source.kind == SHARDS:
                    path = path.partition(IN_SHARD)[0]
                try:
                    file = os.open(f"{source.file}/{path}", _FLAGS)
                except OSError as error:
                    name = image_key(self._classes, record)
                    raise _lost(name, f"{source.file}/{path}", error) from error
                self._own.add(file)
            else:
                file = self._shared[source.number]
            with suppress(OSError):  # advice only
                os.posix_fadvise(file, max(0, record.start), record.size, os.POSIX_FADV_WILLNEED)
            result.append(OpenedRecord(record, source, file))
        self._slow = time.perf_counter() - began > _SLOW * len(batch)
        return result

    def _check_shared(self, source: SourceRow, file: int) -> None:
        try:
            stat = os.fstat(file)
        except OSError as error:
            raise DataError(f"{source.spec}: {source.file}: {error.strerror}") from error
        if (stat.st_size, stat.st_mtime_ns) != (source.size, source.stamp):
            raise DataError(f"{source.spec}: {source.file} {_CHANGED}")

    def _name(self, opened: OpenedRecord) -> str:
        return (
            f"{image_key(self._classes, opened.record)}: {origin_of(opened.source, opened.record)}"
        )


def _lost(name: str, path: str, error: OSError) -> DataError:
    return DataError(f"{name}: {path}: {error.strerror}; it was there when planned")


def _read(file: int, view: memoryview, start: int) -> bool:
    """Fill view from offset start; return False when the file ends before."""
    while view:
        size = os.preadv(file, [view], start)
        if not size:
            return False
        view = view[size:]
        start += size
    return True
