"""Sources whose images are no byte ranges of what the user gave: they are unpacked into a file.

That file is a sequence of entries, each a head with its two lengths, JSON, and an image. The JSON
of the first is the class names by label, or null; that of each other is [label or class, name].
"""

import json
import os
import struct
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.data.records import LABEL_LIMIT
from mpl_fast.errors import DataError
from mpl_fast.packing.sources.lists import class_numbers
from mpl_fast.packing.sources.source import Image, Request, Source
from mpl_fast.packing.sources.spool import spooled
from mpl_fast.untrusted import json_value

_HEAD = struct.Struct("<IQ")
_READ = 512  # bytes; most heads with their JSON


class Unpacked(NamedTuple):
    """What a source contains, image by image."""

    files: Sequence[Path]  # that it is read from
    names: Sequence[str] | None  # of the classes by label, if the source has them
    # Label or class (None: it has none), name, image file.
    images: Iterable[tuple[int | str | None, str, bytes | memoryview]]
    variant: str = ""  # if the same part of the same files can be read in several ways


class UnpackedSource(Source):
    """Images with labels that have to be decompressed or encoded."""

    kind = "unpacked"
    has_labels = True
    has_folders = True

    def __init__(self, request: Request) -> None:
        content = self._unpack(request)
        part = f"{type(self).__name__}:{request.folder}:{content.variant}"
        super().__init__(request, spooled(request, _entries(content), content.files, part))

    @classmethod
    @abstractmethod
    def _unpack(cls, request: Request) -> Unpacked:
        """Return the content of what a request names; its images are read when they are needed."""

    def _list(self) -> Iterator[Image]:
        entries = _places(self.file)
        names = next(entries)[0]
        highest, images = -1, 0
        for (label, name), start, size in entries:
            images += 1
            class_name = label or ""
            if isinstance(label, int):
                highest = max(highest, label)
                class_name = names[label] if names else str(label)
            path = f"{class_name}/{name}" if class_name else name
            yield Image(class_name, name, path, start, size, 0)
        if names or highest >= 0:
            self.class_order = tuple(names or class_numbers(highest, images, self.spec))


def _entries(content: Unpacked) -> Iterator[bytes | memoryview]:
    yield _head(None if content.names is None else [*content.names], 0)
    for label, name, image in content.images:
        if isinstance(label, int) and label >= LABEL_LIMIT:
            fault = f"label {label} is more than {LABEL_LIMIT - 1}"
            raise DataError(f"{content.files[0]}: {name}: {fault}")
        yield _head([label, name], len(image))
        yield image  # apart from its head, since joining would copy it


def _head(key: object, size: int) -> bytes:
    text = json.dumps(key).encode()
    return _HEAD.pack(len(text), size) + text


def _places(path: Path) -> Iterator[tuple[Any, int, int]]:
    """Yield key, start and size of each entry."""
    with path.open("rb") as file:
        descriptor, at, stop = file.fileno(), 0, os.fstat(file.fileno()).st_size
        while at < stop:
            block = os.pread(descriptor, _READ, at)
            length, size = _HEAD.unpack_from(block)
            start = at + _HEAD.size + length
            text = block[_HEAD.size :][:length]
            if len(text) < length:
                text = os.pread(descriptor, length, at + _HEAD.size)
            yield json_value(text), start, size
            at = start + size
