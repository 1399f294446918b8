"""MNIST and its like (Fashion-MNIST, KMNIST): an idx file of images and one of labels beside it."""

import struct
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.sources.raw_pixels import pieces, png
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.spool import decompressed
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource
from mpl_fast.packing.write.pixels import PIXEL_LIMIT

_IMAGES, _LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"  # bytes, in 3 dimensions and in 1
_READ = 1 << 20
_LABEL_BYTES = 1 << 26  # of a file of labels; the largest published has 814,255


class MnistSource(UnpackedSource):
    """The images of an idx file, gzipped or not, as PNG."""

    has_folders = False

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        try:
            return next(_blocks(path), b"")[:4] in (_IMAGES, _LABELS)
        except DataError:
            return False  # let others name the damage

    @classmethod
    def _unpack(cls, request: Request) -> Unpacked:
        path = request.path
        beside = path.name.replace("images", "labels").replace("idx3", "idx1")
        stem = beside.removesuffix(".gz")
        found = [path.with_name(name) for name in (beside, stem, f"{stem}.gz")]
        file = next((file for file in found if file != path and file.is_file()), None)
        if next(_blocks(path))[:4] == _LABELS:
            raise DataError(f"{path}: holds labels; name the file of the images")
        if file is None and request.unlabeled:
            return Unpacked((path,), None, _images(path, None, b""), "unlabeled")
        if file is None:
            raise DataError(f"{path}: its labels must be beside it, as {found[0].name}")
        labels = b"".join(_first(_LABEL_BYTES, _blocks(file)))
        if labels[:4] != _LABELS or len(labels) != 8 + int.from_bytes(labels[4:8], "big"):
            raise DataError(f"{file}: no idx file of labels, or cut short")
        return Unpacked((path, file), None, _images(path, file, labels[8:]))


def _blocks(path: Path) -> Iterator[bytes]:
    blocks = decompressed(path)
    if blocks is not None:
        yield from blocks
        return
    with path.open("rb") as file:
        while block := file.read(_READ):
            yield block


def _first(most: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield blocks until they have more than that many bytes."""
    for block in blocks:
        yield block
        most -= len(block)
        if most < 0:
            return


def _images(
    path: Path, beside: Path | None, labels: bytes
) -> Iterator[tuple[int | None, str, bytes]]:
    """Yield label (None without a file of labels), name and image."""
    import numpy as np

    blocks = _blocks(path)
    content = next(blocks)
    if len(content) < 16:
        raise DataError(f"{path}: cut short in its header")
    count, height, width = struct.unpack_from(">III", content, 4)
    if beside is not None and count != len(labels):
        raise DataError(f"{path}: has {count} images, but {beside} {len(labels)} labels")
    if height * width > PIXEL_LIMIT:
        raise DataError(f"{path}: damaged: images of {height} x {width} pixels")
    stem = path.name.partition("-idx")[0].partition(".")[0]
    images = pieces(chain([content[16:]], blocks), height * width)
    for row, label in enumerate(labels if beside is not None else repeat(None, count)):
        image = next(images, b"")
        if len(image) < height * width or not image:
            raise DataError(f"{path}: cut short at image {row} of {count}")
        pixels = np.frombuffer(image, np.uint8).reshape(height, width)
        yield label, f"{stem}_{row:05d}.png", png(pixels)
    if next(images, b""):
        raise DataError(f"{path}: goes on after its {count} images")
