"""What packing is measured on, and what was written of it.

The readers share no code with the writers.
"""

import itertools
import mmap
import random
import re
import struct
import tarfile
from collections import Counter
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
MARK = JPEG_START + b"\xff\xfe\x00\x12number: "  # a comment, which readers skip; 8 digits follow
MAGIC = struct.pack("<I", 0xCED7230A)
IMAGE_HEADER = 24  # bytes of a record: MXNet's flag, label and two ids


class Data(NamedTuple):
    """JPEG images in class folders."""

    images: int
    bytes: int
    short_sides: tuple[int, int]  # the smallest and the largest of the images, pixels


def photographs(archive: Path | None, size: int) -> list[bytes]:
    """The first JPEG files of a tar, of about `size` bytes and at most 1 GiB; or generated ones.

    Those with MXNet's magic word, which records would cut, are left out. Raises `DataError` if the
    archive has none.
    """
    if archive is None:
        return [smooth_jpeg(number, *TILE) for number in range(SMOOTH)]
    found, left = [], min(size, 1 << 30)
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member)
            image = content.read() if content else b""
            if image.startswith(JPEG_START) and MAGIC not in image:
                found.append(image)
                left -= len(image)
            if left <= 0:
                break
    if not found:
        raise DataError(f"{archive}: has no JPEG file")
    return found


def make_folders(archive: Path | None, out: Path, size: int) -> Data:
    """Copies of the photographs until they have `size` bytes; a number makes each different."""
    images = photographs(archive, size)

    def numbered() -> Iterator[bytes]:
        left = size
        for number, image in enumerate(itertools.cycle(images)):
            yield (marked := MARK + b"%08d" % number + image[len(JPEG_START) :])
            left -= len(marked)
            if left <= 0:
                return

    return _write(numbered(), out, size * len(images) // sum(map(len, images)))


def make_mosaics(archive: Path | None, out: Path, images: int) -> Data:
    """Pictures of 1000 x 750 pixels, each of four photographs: all have to be made smaller.

    Enlarged photographs would be smoother, so quicker to encode, than real ones of this size.
    """
    some = photographs(archive, 64 << 20)[:TILES]
    tiles = [cv2.resize(simplejpeg.decode_jpeg(image), TILE) for image in some]
    chance = random.Random(0)

    def mosaics() -> Iterator[bytes]:
        for _ in range(images):
            a, b, c, d = chance.choices(tiles, k=4)
            pixels = np.vstack([np.hstack([a, b]), np.hstack([c, d])])  # (750, 1000, 3) uint8
            yield simplejpeg.encode_jpeg(pixels, quality=95)

    return _write(mosaics(), out, images)


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


def _write(images: Iterable[bytes], out: Path, expected: int) -> Data:
    """As many class folders as have enough images, at most `CLASSES`; beside them a list in the
    order of im2rec's."""
    classes = max(1, min(CLASSES, expected // A_CLASS))
    size, sides, lines = 0, [], []
    for number, image in enumerate(images):
        file = out / f"class_{number % classes:04d}" / f"{number:08d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        size += len(image)
        sides.append(min(simplejpeg.decode_jpeg_header(image)[:2]))
        lines.append(f"{number}\t{number % classes}\t{file.relative_to(out)}\n")
    random.Random(100).shuffle(lines)
    out.with_suffix(".lst").write_text("".join(lines))
    return Data(len(sides), size, (min(sides), max(sides)))


def altered(out: Path, source: Path) -> list[int]:
    """The images of `make_folders` that the files in `out` do not have once, byte for byte."""
    images = {int(file.stem): file for file in source.rglob("*.JPEG")}
    found = Counter[int]()
    for file in out.rglob("*"):
        if file.is_dir() or not file.stat().st_size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as whole:
            for match in re.finditer(MARK + rb"(\d{8})", whole):
                number = int(match[1])
                image = images[number].read_bytes()
                found[number] += whole[match.start() : match.start() + len(image)] == image
    return [number for number in images if found[number] != 1]


def short_sides(out: Path) -> list[int]:
    """Of the images of all .rec files; train.idx must list as many records with other ids.

    Raises ValueError, OSError or struct.error for what cannot be read.
    """
    sides = []
    for file in sorted(out.glob("*.rec")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            magic, length = struct.unpack_from("<4sI", content, at)
            if magic != MAGIC:
                raise ValueError(f"{file.name} has no record at byte {at}")
            part, size = length >> 29, length & (1 << 29) - 1
            if part in (0, 1):  # whole, or the first part of several
                image = content[at + 8 + IMAGE_HEADER : at + 8 + size]
                sides.append(min(simplejpeg.decode_jpeg_header(image)[:2]))
            at += 8 + (size + 3 & ~3)
    ids = {line.split()[0] for line in (out / "train.idx").read_text().splitlines()}
    if len(ids) != len(sides):
        raise ValueError(f"train.idx lists {len(ids)} records, there are {len(sides)}")
    return sides
