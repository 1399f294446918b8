"""One shard, from its rows in the table to a complete file: the job of one worker process."""

import zlib
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mpl_fast.data.records import (
    HEAD_SIZE,
    IMAGE_LIMIT,
    holds_magic,
    image_record,
    is_multipart,
    record_head,
)
from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow, ShardRow, reading
from mpl_fast.packing.write.process_image import treat
from mpl_fast.packing.write.reader import Opened, Reader
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt, sync_folder
from mpl_fast.packing.write.shard_writer import ShardWriter


class StoppedError(Exception):
    """The run was interrupted; this shard is not complete."""


def write_shard(
    work: Path,
    number: int,
    image_options: ImageOptions,
    read_threads: int,
    advance: Callable[[int], bool],
) -> ShardReceipt:
    """Write shard `number` of the table in the folder work, and what finish needs beside it.

    Unless an image failed: then no file is left, and the remarks of the result name every such
    image. advance is told the size of each image done, in bytes as in its source; when it returns
    False the job ends with StoppedError. read_threads open files ahead, 0 for none. DataError
    tells that a source changed or that no image is left, OutputError that work cannot be written.
    """
    with reading(work / TABLE) as table, output_errors(work):
        shard = table.shard(number)
        temporary = work / f"{shard.file}.tmp"
        try:
            with (
                closing(Reader(table.sources(), table.classes(), read_threads)) as reader,
                closing(ShardWriter(temporary)) as writer,
            ):
                job = _Job(reader, writer, image_options)
                for opened in reader.opened(table.records(shard)):
                    job.pack(opened)
                    if not advance(opened.record.size):
                        raise StoppedError
                reader.require_unchanged()
                done = job.finish(shard)
            if not any(remark.action == "failed" for remark in done.remarks):
                _publish(temporary, work, done)
            return done
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, work: Path, done: ShardReceipt) -> None:
    """Give a complete shard its name, then save what is told of it."""
    if not len(done.ids):
        raise DataError(
            f"{done.file}: all its images are skipped, and a file without records cannot be read "
            f"(the first: {done.remarks[0].reason}); use fewer shards, or mend the images"
        )
    target = work / done.file
    saved = work / f"{done.file}.done"
    saved.unlink(missing_ok=True)  # it tells of the file that is replaced now
    temporary.replace(target)
    sync_folder(work)
    done.save(saved)
    sync_folder(work)


class _Job:
    """Packs the images of one shard and counts what finish will ask for."""

    def __init__(self, reader: Reader, writer: ShardWriter, image_options: ImageOptions) -> None:
        self._reader = reader
        self._writer = writer
        self._image_options = image_options
        self._ids = array("I")
        self._offsets = array("Q")
        self._lengths = array("I")
        self._sizes = array("I")
        self._crc32 = array("I")
        self._remarks: list[Remark] = []
        self._bytes_in = self._multipart = self._reencoded = self._rotated = 0

    def pack(self, opened: Opened) -> None:
        """Write one image as a record, or remark why not."""
        record = opened.record
        self._bytes_in += record.size
        if opened.source.kind != "records" and record.size > IMAGE_LIMIT:
            self._refuse(record, record.size)
            return
        in_place = opened.source.kind != "records" and self._writer.fits(HEAD_SIZE + record.size)
        image = self._image_in_place(opened) if in_place else self._reader.image(opened)
        treated = treat(image, record.name, self._image_options)
        if treated.action:
            self._remarks.append(Remark(record.id, treated.reason, treated.action))
        if treated.action in ("failed", "skipped"):
            return
        self._reencoded += treated.reencoded
        self._rotated += treated.rotated
        if treated.image is not None:
            image, in_place = treated.image, False
        if len(image) > IMAGE_LIMIT:
            self._refuse(record, len(image))
        elif in_place and not holds_magic(image):
            self._keep(record, image)
        else:
            self._append(record, bytes(image))

    def finish(self, shard: ShardRow) -> ShardReceipt:
        """Wait until the file is on disk; return what was written."""
        import numpy as np  # late: the command line's --help must not wait for it

        return ShardReceipt(
            file=shard.file,
            content=shard.content,
            stamps=shard.stamps,
            sha256=self._writer.finish(),
            size=self._writer.position,
            bytes_in=self._bytes_in,
            multipart=self._multipart,
            reencoded=self._reencoded,
            rotated=self._rotated,
            ids=np.asarray(self._ids),
            offsets=np.asarray(self._offsets),
            lengths=np.asarray(self._lengths),
            sizes=np.asarray(self._sizes),
            crc32=np.asarray(self._crc32),
            remarks=self._remarks,
        )

    def _refuse(self, record: RecordRow, size: int) -> None:
        reason = f"{size} bytes are too many, a record holds {IMAGE_LIMIT}"
        action = "skipped" if self._image_options.on_bad == "skip" else "failed"
        self._remarks.append(Remark(record.id, reason, action))

    def _image_in_place(self, opened: Opened) -> "bytes | memoryview":
        """Read an image to where it will lie in the file; return it in one piece."""
        start = self._writer.position + HEAD_SIZE
        views = self._writer.room(start, opened.record.size)
        self._reader.fill(opened, views)
        return views[0] if len(views) == 1 else b"".join(views)

    def _keep(self, record: RecordRow, image: "bytes | memoryview") -> None:
        """Complete the record of an image that lies in its place."""
        size = len(image)
        padding = -size % 4
        start = self._writer.position
        self._writer.put(start, record_head(record.label, record.id, size))
        if padding:
            self._writer.put(start + HEAD_SIZE + size, bytes(padding))
        self._count(record, image, HEAD_SIZE + size + padding)
        self._writer.advance(HEAD_SIZE + size + padding)

    def _append(self, record: RecordRow, image: bytes) -> None:
        framed = image_record(record.label, record.id, image)
        self._multipart += is_multipart(framed)
        self._count(record, image, len(framed))
        self._writer.append(framed)

    def _count(self, record: RecordRow, image: "bytes | memoryview", length: int) -> None:
        self._ids.append(record.id)
        self._offsets.append(self._writer.position)
        self._lengths.append(length)
        self._sizes.append(len(image))
        self._crc32.append(zlib.crc32(image))
