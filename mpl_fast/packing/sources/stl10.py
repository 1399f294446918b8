"""STL-10's binary files as published, unpacked: images in one, labels and class names beside it."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

from mpl_fast.errors import DataError
from mpl_fast.packing.sources.raw_pixels import png
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource

_SIDE = 96
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image: all red, all green, all blue, each by columns
_IMAGES = "_X.bin"


class Stl10Source(UnpackedSource):
    """The images of train_X.bin, test_X.bin or unlabeled_X.bin, as PNG."""

    has_folders = False

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return path.name.endswith(_IMAGES) and path.is_file()

    @classmethod
    def _unpack(cls, request: Request) -> Unpacked:
        path = request.path
        size = path.stat().st_size
        if size % _PIXELS or not size:
            raise DataError(f"{path}: {size} bytes are no multiple of {_PIXELS}: cut short?")
        beside = path.with_name(path.name.replace(_IMAGES, "_y.bin"))
        titles = path.with_name("class_names.txt")
        if request.unlabeled and not beside.is_file():
            return Unpacked((path,), None, _images(path, repeat(None, size // _PIXELS)))
        for file in (beside, titles):
            if not file.is_file():
                hint = " (or give it as --unlabeled-src)" if file == beside else ""
                raise DataError(f"{path}: {file.name} must be beside it{hint}")
        labels, names = beside.read_bytes(), titles.read_text("utf-8", "replace").split()
        if len(labels) != size // _PIXELS:
            raise DataError(f"{path}: has {size // _PIXELS} images, but {beside} {len(labels)}")
        if not all(1 <= label <= len(names) for label in labels):
            raise DataError(f"{beside}: labels are not all 1 to {len(names)}, as in {titles}")
        files = (path, beside, titles)
        return Unpacked(files, names, _images(path, (label - 1 for label in labels)))


def _images(path: Path, labels: Iterator[int | None]) -> Iterator[tuple[int | None, str, bytes]]:
    import numpy as np

    stem = path.name.removesuffix(_IMAGES)
    with path.open("rb") as file:
        for row, label in enumerate(labels):
            image = file.read(_PIXELS)
            if len(image) < _PIXELS:
                raise DataError(f"{path}: cut short at image {row}")
            planes = np.frombuffer(image, np.uint8).reshape(3, _SIDE, _SIDE)
            yield label, f"{stem}_{row:06d}.png", png(planes.transpose(2, 1, 0))
