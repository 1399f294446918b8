"""What packing is measured on: class folders of photographs, and a tar of very many members."""

import itertools
import random
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

from mpl_fast.errors import DataError
from tools.bench.smooth_images import smooth_jpeg

TILE = (500, 375)  # width, height: an ImageNet photograph's usual size
TILES = 200  # decoded photographs that are kept in memory, 112 MB
SMOOTH = 8  # generated photographs
MEMBER_CLASSES = 1000
CLASSES = 100
A_CLASS = 20  # images at least, so that a tenth of all still has one of each
MEMBERS_A_CLASS = 200  # the same for a hundredth
JPEG_START = b"\xff\xd8"
COMMENT = b"\xff\xfe"  # a JPEG segment that readers skip


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


def make_folders(archive: Path | None, out: Path, size: int) -> None:
    """Copies of the photographs until they have `size` bytes; a number makes each different.

    There are as many classes as have enough images, at most `CLASSES`.
    """
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

    _write(numbered(), out, expected // A_CLASS)


def make_mosaics(archive: Path | None, out: Path, images: int) -> None:
    """Pictures of 1000 x 750 pixels, each of four photographs: all have to be made smaller.

    Enlarged photographs would be smoother, so quicker to encode, than real ones of this size.
    """
    import cv2
    import numpy as np
    import simplejpeg

    some = photographs(archive, 64 << 20)[:TILES]
    tiles = [cv2.resize(simplejpeg.decode_jpeg(image), TILE) for image in some]
    chance = random.Random(0)

    def mosaics() -> Iterable[bytes]:
        for _ in range(images):
            a, b, c, d = chance.choices(tiles, k=4)
            pixels = np.vstack([np.hstack([a, b]), np.hstack([c, d])])  # (750, 1000, 3) uint8
            yield simplejpeg.encode_jpeg(pixels, quality=95)

    _write(mosaics(), out, images // A_CLASS)


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


def _write(images: Iterable[bytes], out: Path, classes: int) -> None:
    count = max(1, min(CLASSES, classes))
    folders = [out / f"class_{label:04d}" for label in range(count)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, image in enumerate(images):
        (folders[number % len(folders)] / f"{number:07d}.JPEG").write_bytes(image)
