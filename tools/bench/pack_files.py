"""What packing is measured on, and the counts of what was written.

The readers share no code with the writers, and their counts do not depend on the order.
"""

import itertools
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from mpl_fast.errors import DataError
from tools.bench.smooth_images import smooth_jpeg

TILE = (500, 375)  # width, height: an ImageNet photograph's usual size
TILES = 200  # decoded photographs that are kept in memory, 112 MB
SMOOTH = 8  # generated photographs
CLASSES, A_CLASS = 100, 20  # so many images a class at least: a tenth of all has one of each
MEMBER_CLASSES, MEMBERS_A_CLASS = 1000, 200  # the same for a hundredth
JPEG_START = b"\xff\xd8"
COMMENT = b"\xff\xfe"  # a JPEG segment that readers skip
MAGIC = struct.pack("<I", 0xCED7230A)
IMAGE_HEADER = 24  # bytes of a record: MXNet's flag, label and two ids


class Counts(NamedTuple):
    """Of JPEG images."""

    images: int
    bytes: int
    checksum: int  # the sum of the images' crc32 values
    short_sides: tuple[int, int]  # the smallest and the largest of the images, pixels


def photographs(archive: Path | None, size: int) -> list[bytes]:
    """The first JPEG files of a tar, of about `size` bytes and at most 1 GiB; or generated ones.

    Raises `DataError` if the archive has none.
    """
    if archive is None:
        return [smooth_jpeg(number, *TILE) for number in range(SMOOTH)]
    found, left = [], min(size, 1 << 30)
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member)
            image = content.read() if content else b""
            if image.startswith(JPEG_START):
                found.append(image)
                left -= len(image)
            if left <= 0:
                break
    if not found:
        raise DataError(f"{archive}: has no JPEG file")
    return found


def make_folders(archive: Path | None, out: Path, size: int) -> Counts:
    """Copies of the photographs until they have `size` bytes; a number makes each different."""
    images = photographs(archive, size)
    expected = size * len(images) // sum(map(len, images))

    def numbered() -> Iterable[bytes]:
        left = size
        for number in itertools.count():
            image = images[number % len(images)]
            comment = COMMENT + struct.pack(">HQ", 10, number)
            yield JPEG_START + comment + image[2:]
            left -= len(image) + len(comment)
            if left <= 0:
                return

    return _write(numbered(), out, expected // A_CLASS)


def make_mosaics(archive: Path | None, out: Path, images: int) -> Counts:
    """Pictures of 1000 x 750 pixels, each of four photographs: all have to be made smaller.

    Enlarged photographs would be smoother, so quicker to encode, than real ones of this size.
    """
    some = photographs(archive, 64 << 20)[:TILES]
    tiles = [cv2.resize(simplejpeg.decode_jpeg(image), TILE) for image in some]
    chance = random.Random(0)

    def mosaics() -> Iterable[bytes]:
        for _ in range(images):
            a, b, c, d = chance.choices(tiles, k=4)
            pixels = np.vstack([np.hstack([a, b]), np.hstack([c, d])])  # (750, 1000, 3) uint8
            yield simplejpeg.encode_jpeg(pixels, quality=95)

    return _write(mosaics(), out, images // A_CLASS)


def make_members(out: Path, rows: int) -> None:
    """A tar as long as ImageNet's list, its images stand-ins of a few bytes."""
    classes = max(1, min(MEMBER_CLASSES, rows // MEMBERS_A_CLASS))
    with out.open("wb") as file:
        for row in range(rows):
            member = tarfile.TarInfo(f"n{row % classes:08d}/{row:08d}.JPEG")
            content = JPEG_START + b"%010d" % row
            member.size = len(content)
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
        file.write(bytes(1024))


def _write(images: Iterable[bytes], out: Path, classes: int) -> Counts:
    """As many class folders as have enough images, at most `CLASSES`."""
    folders = [out / f"class_{label:04d}" for label in range(max(1, min(CLASSES, classes)))]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, image in enumerate(images):
        (folders[number % len(folders)] / f"{number:07d}.JPEG").write_bytes(image)
    return tally(read_folders(out))


def tally(images: Iterable[bytes]) -> Counts:
    """Counts JPEG images. Raises ValueError for another file."""
    found, size, checksum, sides = 0, 0, 0, set[int]()
    for image in images:
        found, size, checksum = found + 1, size + len(image), checksum + zlib.crc32(image)
        sides.add(min(simplejpeg.decode_jpeg_header(image)[:2]))
    return Counts(found, size, checksum, (min(sides, default=0), max(sides, default=0)))


def count(kind: str, out: Path, source: Path) -> Counts:
    """Of a folder that was written as copy, tar, mds or rec.

    Raises ValueError, OSError or struct.error for what cannot be read.
    """
    if kind == "copy":
        return tally(read_copy(out, source))
    return tally({"tar": read_tars, "mds": read_mds, "rec": read_records}[kind](out))


def read_folders(root: Path) -> Iterator[bytes]:
    """The files of all class folders, in the order in which the copy reads them."""
    for folder in sorted(root.iterdir()):
        for file in sorted(folder.iterdir()):
            yield file.read_bytes()


def read_copy(out: Path, source: Path) -> Iterator[bytes]:
    """The images of a plain copy, cut by the sizes of its source's files."""
    with (out / "copy.bin").open("rb") as whole:
        yield from (whole.read(len(image)) for image in read_folders(source))
        if more := whole.read():
            yield more


def read_tars(out: Path) -> Iterator[bytes]:
    """The files of all archives but for webdataset's labels."""
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file and not member.name.endswith(".cls"):
                    yield file.read()


def read_mds(out: Path) -> Iterator[bytes]:
    """The images of MDS shards: u32 samples, u32 offsets, then u32 size, image, label."""
    for path in sorted(out.glob("*.mds")):
        content = path.read_bytes()
        (samples,) = struct.unpack_from("<I", content)
        for offset in struct.unpack_from(f"<{samples}I", content, 4):
            (size,) = struct.unpack_from("<I", content, offset)
            yield content[offset + 4 : offset + 4 + size]


def read_records(out: Path) -> Iterator[bytes]:
    """The images of all .rec files; train.idx must list as many records with other ids.

    A record of several parts gets back its magic words.
    """
    count, parts = 0, list[bytes]()
    for path in sorted(out.glob("*.rec")):
        with path.open("rb") as file:
            while head := file.read(8):
                magic, length = struct.unpack("<4sI", head)
                if magic != MAGIC:
                    raise ValueError(f"no record at byte {file.tell() - 8}")
                flag, size = length >> 29, length & (1 << 29) - 1
                parts.append(file.read(size + 3 & ~3)[:size])
                if flag in (0, 3):  # whole, or the last part
                    yield MAGIC.join(parts)[IMAGE_HEADER:]
                    count, parts = count + 1, []
    ids = {line.split()[0] for line in (out / "train.idx").read_text().splitlines()}
    if len(ids) != count:
        raise ValueError(f"train.idx lists {len(ids)} records, there are {count}")
