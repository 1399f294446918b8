"""Writes one shard: from its rows in the table to a complete .rec file with its receipt."""

import zlib
from array import array
from contextlib import closing
from pathlib import Path

from mpl_fast.atomic import sync_folder
from mpl_fast.data.records import (
    HEAD_SIZE,
    IMAGE_LIMIT,
    holds_magic,
    image_record,
    is_multipart,
    record_head,
)
from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.checksum import joined_crc32
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow, ShardRow, open_table
from mpl_fast.packing.sources.kinds import DECODERS
from mpl_fast.packing.write.pool import Advance
from mpl_fast.packing.write.process_image import process_image
from mpl_fast.packing.write.reader import OpenedRecord, Reader
from mpl_fast.packing.write.shard_receipt import COLUMNS, Remark, ShardReceipt, receipt_path
from mpl_fast.packing.write.shard_writer import ShardWriter


def write_shard(
    work: Path, shard: ShardRow, image_options: ImageOptions, read_threads: int, advance: Advance
) -> ShardReceipt:
    """Write a shard of the table in the folder work, and its receipt; return the receipt.

    If an image failed no file is left, and the remarks of the result name every such image.
    advance is called with 1 and the bytes of each image in its source. read_threads open files
    ahead, 0 for none. Raises DataError when a source changed or no image is left, OutputError
    when work cannot be written.
    """
    temporary = work / f"{shard.file}.tmp"
    with open_table(work / TABLE) as table, output_errors(work):
        try:
            with (
                closing(Reader(table.sources(), table.classes(), read_threads)) as reader,
                closing(ShardWriter(temporary)) as writer,
            ):
                packer = _ShardPacker(reader, writer, image_options)
                for opened in reader.opened(table.records(shard)):
                    packer.pack(opened)
                    advance(1, opened.record.size)
                reader.require_unchanged()
                receipt = packer.finish(shard)
            if not any(remark.action == "failed" for remark in receipt.remarks):
                _publish(temporary, work, receipt)
            return receipt
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, work: Path, receipt: ShardReceipt) -> None:
    """Rename a complete shard, which is on disk already, then save its receipt."""
    if not len(receipt.ids):
        raise DataError(
            f"{receipt.file}: all its images are skipped, and a file without records cannot be "
            f"read (the first: {receipt.remarks[0].reason}); use fewer shards, or repair the images"
        )
    path = receipt_path(work, receipt.file)
    path.unlink(missing_ok=True)  # it describes the file that is replaced now
    temporary.replace(work / receipt.file)
    sync_folder(work)
    receipt.save(path)


class _ShardPacker:
    """Packs the images of one shard and collects its receipt."""

    def __init__(self, reader: Reader, writer: ShardWriter, image_options: ImageOptions) -> None:
        self._reader = reader
        self._writer = writer
        self._image_options = image_options
        self._columns = {name: array("Q") for name in COLUMNS}
        self._parts = array("I"), array("q")  # crc32 and length of what was written
        self._remarks: list[Remark] = []
        self._bytes_in = self._multipart = self._reencoded = self._rotated = 0

    def pack(self, opened: OpenedRecord) -> None:
        """Write one image as a record, or remark why not."""
        record = opened.record
        self._bytes_in += record.size
        stored_as_is = opened.source.kind not in DECODERS
        if stored_as_is and record.size > IMAGE_LIMIT:
            self._refuse(record, record.size)
            return
        in_place = stored_as_is and self._writer.fits(HEAD_SIZE + record.size)
        image = self._image_in_place(opened) if in_place else self._reader.image(opened)
        processed = process_image(image, record.name, self._image_options)
        if processed.action:
            self._remarks.append(Remark(record.id, processed.reason, processed.action))
        if processed.action in ("failed", "skipped"):
            return
        if processed.image is not None:
            image, in_place = processed.image, False
            self._reencoded += 1
            self._rotated += processed.rotated
        if len(image) > IMAGE_LIMIT:
            self._refuse(record, len(image))
        elif in_place and not holds_magic(image):
            self._complete_in_place(record, image)
        else:
            self._append(record, bytes(image))

    def finish(self, shard: ShardRow) -> ShardReceipt:
        """Wait until the file is on disk; return its receipt."""
        import numpy as np  # late: the command line's --help must not wait for it

        self._writer.finish()
        crcs, lengths = self._parts
        whole = joined_crc32(np.array(crcs, np.uint32), np.array(lengths, np.int64))
        return ShardReceipt(
            file=shard.file,
            content=shard.content,
            stamps=shard.stamps,
            checksum=f"{whole:08x}",
            size=self._writer.position,
            bytes_in=self._bytes_in,
            multipart=self._multipart,
            reencoded=self._reencoded,
            rotated=self._rotated,
            remarks=self._remarks,
            **{name: np.asarray(self._columns[name], kind) for name, kind in COLUMNS.items()},
        )

    def _refuse(self, record: RecordRow, size: int) -> None:
        reason = f"{size} bytes are too many, a record holds {IMAGE_LIMIT}"
        action = "skipped" if self._image_options.on_bad == "skip" else "failed"
        self._remarks.append(Remark(record.id, reason, action))

    def _image_in_place(self, opened: OpenedRecord) -> "bytes | memoryview":
        """Read an image into the output buffers at its final position; return it in one piece."""
        start = self._writer.position + HEAD_SIZE
        views = self._writer.room(start, opened.record.size)
        self._reader.fill(opened, views)
        return views[0] if len(views) == 1 else b"".join(views)

    def _complete_in_place(self, record: RecordRow, image: "bytes | memoryview") -> None:
        """Add head and padding to an image that was read in place."""
        size = len(image)
        start, crc = self._writer.position, zlib.crc32(image)
        head, padding = record_head(record.label, record.id, size), bytes(-size % 4)
        self._writer.put(start, head)
        self._writer.put(start + HEAD_SIZE + size, padding)
        self._count_part(zlib.crc32(head), HEAD_SIZE)
        self._count_part(zlib.crc32(padding, crc), size + len(padding))
        self._count(record, size, crc, HEAD_SIZE + size + len(padding))
        self._writer.advance(HEAD_SIZE + size + len(padding))

    def _append(self, record: RecordRow, image: bytes) -> None:
        framed = image_record(record.label, record.id, image)
        self._multipart += is_multipart(framed)
        self._count_part(zlib.crc32(framed), len(framed))
        self._count(record, len(image), zlib.crc32(image), len(framed))
        self._writer.append(framed)

    def _count_part(self, crc: int, length: int) -> None:
        self._parts[0].append(crc)
        self._parts[1].append(length)

    def _count(self, record: RecordRow, size: int, crc: int, length: int) -> None:
        values = (record.id, self._writer.position, length, size, crc)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
