"""One shard, from its plan to a complete temporary file: the job of one worker process."""

import hashlib
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpl_fast.data.records import IMAGE_LIMIT, image_record, is_multipart
from mpl_fast.errors import DataError
from mpl_fast.packing.image_check import find_fault
from mpl_fast.packing.plan import ShardPlan
from mpl_fast.packing.sources import ImageFile

_BUFFER = 4 << 20  # bytes written at a time


@dataclass(frozen=True)
class ShardResult:
    """What was written: sizes and offsets in bytes, and the images that cannot be used."""

    size: int
    bytes_in: int
    sha256: str
    multipart: int
    offsets: "array[int]"
    faults: list[tuple[ImageFile, str]]  # (image, reason)


class StoppedError(Exception):
    """The run was interrupted; this shard is not complete."""


def write_shard(plan: ShardPlan, target: Path, advance: Callable[[int], bool]) -> ShardResult:
    """Write the records of plan to target and fsync it; faulty images are listed, not written.

    advance is told the size of each image done, in bytes; when it returns False the job ends with
    StoppedError.
    """
    digest = hashlib.sha256()
    offsets = array("Q")
    faults = []
    position = bytes_in = multipart = 0
    reader = _Reader()
    try:
        with target.open("wb", buffering=_BUFFER) as file:
            for row, (image, label) in enumerate(zip(plan.images, plan.labels, strict=True)):
                content, fault = _read_checked(reader, image, plan.check)
                bytes_in += len(content)
                if fault is not None:
                    faults.append((image, fault))
                else:
                    record = image_record(label, plan.first_id + row, content)
                    offsets.append(position)
                    position += len(record)
                    multipart += is_multipart(record)
                    digest.update(record)
                    file.write(record)
                if not advance(len(content)):
                    raise StoppedError
            file.flush()
            os.fsync(file.fileno())
    finally:
        reader.close()
    return ShardResult(position, bytes_in, digest.hexdigest(), multipart, offsets, faults)


def _read_checked(reader: "_Reader", image: ImageFile, check: str) -> tuple[bytes, str | None]:
    """Return the bytes of an image, and why they cannot be used or None."""
    if image.size > IMAGE_LIMIT:
        return b"", f"{image.size} bytes are too many, a record holds {IMAGE_LIMIT}"
    content = reader.read(image)
    return content, find_fault(content, check)


class _Reader:
    """Reads images; keeps the one archive open that many images lie in."""

    def __init__(self) -> None:
        self._path = ""
        self._descriptor = -1

    def read(self, image: ImageFile) -> bytes:
        try:
            if image.path != self._path:
                self.close()
                self._descriptor = os.open(image.path, os.O_RDONLY)
                self._path = image.path
            # Only a file of its own starts at 0; its size now shows whether it has grown.
            size = image.size if image.offset else os.fstat(self._descriptor).st_size
            content = os.pread(self._descriptor, image.size, image.offset)
        except OSError as error:
            raise DataError(f"{image.path}: {error.strerror}") from error
        if len(content) != image.size or size != image.size:
            raise DataError(f"{image.key}: {image.path} changed while it was being packed")
        return content

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._path, self._descriptor = "", -1
