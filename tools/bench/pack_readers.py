"""Counts the images in what a variant wrote, with readers that share no code with the writers.

The counts do not depend on the order of the images.
"""

import mmap
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = struct.pack("<I", 0xCED7230A)
IMAGE_HEADER = 24  # bytes: MXNet's flag, label and two ids
Buffer = bytes | memoryview


class Counts(NamedTuple):
    """Of a folder of images."""

    images: int
    bytes: int  # of the images
    checksum: int  # the sum of the images' crc32 values
    short_sides: tuple[int, int]  # the smallest and the largest of the images, pixels


def count(kind: str, out: Path, source: Path) -> Counts:
    """Of a folder that was written as copy, tar, webdataset, mds or rec.

    A copy is cut by the sizes of the files in the class folders of its source. Raises ValueError,
    OSError or struct.error for what cannot be read.
    """
    if kind == "copy":
        return tally(read_copy(out, source))
    readers = {"tar": read_tars, "webdataset": read_tars, "mds": read_mds, "rec": read_records}
    return tally(readers[kind](out))


def tally(images: Iterable[Buffer]) -> Counts:
    """Of JPEG images."""
    from simplejpeg import decode_jpeg_header

    found, size, checksum, short_sides = 0, 0, 0, {0}
    for image in images:
        found += 1
        size += len(image)
        checksum += zlib.crc32(image)
        short_sides.add(min(decode_jpeg_header(bytes(image))[:2]))
    short_sides.discard(0)
    return Counts(found, size, checksum, (min(short_sides, default=0), max(short_sides, default=0)))


def read_folders(root: Path) -> Iterator[Buffer]:
    """The files of all class folders, in the order in which the copy reads them."""
    for folder in sorted(root.iterdir()):
        for file in sorted(folder.iterdir()):
            yield file.read_bytes()


def read_copy(out: Path, source: Path) -> Iterator[Buffer]:
    """The images of a plain copy, cut by the sizes of its source's files."""
    whole = _mapped(out / "copy.bin")
    start = 0
    for image in read_folders(source):
        yield whole[start : start + len(image)]
        start += len(image)
    if start < len(whole):
        yield whole[start:]  # more than the source has


def read_tars(out: Path) -> Iterator[Buffer]:
    """The files of all archives but for webdataset's labels."""
    for path in sorted(out.glob("*.tar")):
        content = _mapped(path)
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and not member.name.endswith(".cls"):
                    yield content[member.offset_data : member.offset_data + member.size]


def read_mds(out: Path) -> Iterator[Buffer]:
    """The images of MDS shards: u32 samples, u32 offsets, then u32 size, image, label."""
    for path in sorted(out.glob("*.mds")):
        content = _mapped(path)
        (samples,) = struct.unpack_from("<I", content)
        for offset in struct.unpack_from(f"<{samples}I", content, 4):
            (size,) = struct.unpack_from("<I", content, offset)
            yield content[offset + 4 : offset + 4 + size]


def read_records(out: Path) -> Iterator[Buffer]:
    """The images of all .rec files; train.idx must list as many records with other ids."""
    count = 0
    for path in sorted(out.glob("*.rec")):
        for record in _frames(_mapped(path)):
            count += 1
            yield record[IMAGE_HEADER:]
    ids = {line.split()[0] for line in (out / "train.idx").read_text().splitlines()}
    if len(ids) != count:
        raise ValueError(f"train.idx lists {len(ids)} records, there are {count}")


def _frames(content: memoryview) -> Iterator[Buffer]:
    """The payloads of a .rec file; one of several parts gets back its magic words."""
    offset = 0
    parts: list[Buffer] = []
    while offset < len(content):
        magic, length = struct.unpack_from("<4sI", content, offset)
        if magic != MAGIC:
            raise ValueError(f"no record at byte {offset}")
        flag, size = length >> 29, length & (1 << 29) - 1
        parts.append(content[offset + 8 : offset + 8 + size])
        offset += 8 + (size + 3 & ~3)
        if flag in (0, 3):  # whole, or the last part
            yield parts[0] if flag == 0 else MAGIC.join(map(bytes, parts))
            parts = []


def _mapped(path: Path) -> memoryview:
    if not path.stat().st_size:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
