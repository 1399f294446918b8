"""Webdataset shards as sources: tars in which the label is a file beside each image.

The files of a sample follow each other and share their name up to its first dot.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO

from mpl_fast.data.records import LABEL_LIMIT, NO_LABEL
from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, PEEKED, kind_of
from mpl_fast.packing.sources.class_folders import Entry
from mpl_fast.packing.sources.lists import class_numbers
from mpl_fast.packing.sources.record_files import classes_beside
from mpl_fast.packing.sources.source import IN_SHARD, SHARDS, Image, Request, Source
from mpl_fast.packing.sources.spool import decompressed, spooled
from mpl_fast.packing.sources.tar import TarSource, first_members, tar_entries
from mpl_fast.untrusted import json_value

_LABELS = (".cls", ".json", ".txt")  # the first that a sample has is taken
_KEYS = ("label", "cls", "class", "class_id", "class_name", "target", "fine_label")  # of a .json
_NUMBER = re.compile(r"-?[0-9]+")
_DIGITS = 20  # more than any label has
_LONGEST = 1 << 20  # bytes of a file with a label
_FEW = 10  # images, of which each may have a class of its own


class WebDatasetSource(TarSource):
    """One shard, whose byte ranges are the images."""

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether a tar begins with a sample: an image with its .cls, .json or .txt.

        In class folders only a .cls makes it one.
        """
        names = first_members(path)
        for _, group in groupby(names, _key):
            found = [*group]
            suffixes = {Path(name).suffix.lower() for name in found}
            labels = _LABELS if "/" not in found[0] else _LABELS[:1]
            if suffixes & {*IMAGE_SUFFIXES} and suffixes & {*labels}:
                return True
        return False

    @property
    def by_folder(self) -> bool:
        """Never: samples or a labels file give them."""
        return False

    def _list(self) -> Iterator[Image]:
        if self.request.labels:
            yield from super()._list()
            return
        samples = _Samples(self.request)
        yield from samples.images(self.file, self._entries())
        self.warnings += samples.warnings()
        self.class_order = samples.class_order()


class ShardsSource(Source):
    """Several shards; each image is in a byte range of one of them.

    If any is compressed, the source is a folder of links to the shards and to what they contain.
    """

    kind = SHARDS

    def __init__(self, request: Request) -> None:
        files = [file.absolute() for file in request.files]
        folder = Path(os.path.commonpath([file.parent for file in files]))
        self._shards = [str(file.relative_to(folder)) for file in files]
        states = [file.stat() for file in files]
        lines = [
            f"{file}\n{state.st_size}\n{state.st_mtime_ns}"
            for file, state in zip(files, states, strict=True)
        ]
        digest = hashlib.sha256(os.fsencode("\n".join(lines))).digest()
        plain = [_plain(file, request) for file in files]
        if plain != files:
            folder = request.work / f"spool-{digest.hex()[:16]}"
            for shard, file in zip(self._shards, plain, strict=True):
                _link(folder / shard, file)
        super().__init__(request, folder)
        # In place of the time of one file, to detect any change.
        self.stamp = int.from_bytes(digest[:7], "big")

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return False

    def _list(self) -> Iterator[Image]:
        samples, labels = _Samples(self.request), self.request.labels
        images = self._images(samples)
        yield from labels.labeled(images, self.request) if labels else images
        self.warnings += samples.warnings()
        self.class_order = samples.class_order()

    def _images(self, samples: "_Samples") -> Iterator[Image]:
        for shard, file in zip(self._shards, self.request.files, strict=True):
            plain = self.file / shard
            stamp = plain.stat().st_mtime_ns
            entries = tar_entries(plain, file, self.request.folder)
            for image in samples.images(plain, entries):
                yield image._replace(path=f"{shard}{IN_SHARD}{image.path}", stamp=stamp)


def _plain(file: Path, request: Request) -> Path:
    """Return a shard, or the file into which it is unpacked."""
    blocks = decompressed(file)
    return file if blocks is None else spooled(request._replace(path=file), blocks)


def _link(path: Path, target: Path) -> None:
    """Make a link, in place of that of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target.absolute())


class _Samples:
    """Images of one source with the labels beside them, which must all be of one form."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._spec = request.spec
        self._place = ""  # where the labels are
        self._numbered = False
        self._names: Sequence[str] | None = None  # of the classes, by number
        self._classes: set[str] = set()
        self._highest = -1
        self._images = 0
        self._others = Tally(3)

    def images(self, file: Path, entries: Iterator[Entry]) -> Iterator[Image]:
        """Yield the images of a shard."""
        visible = (entry for entry in entries if entry.size >= 0 and "/." not in f"/{entry.path}")
        with file.open("rb") as raw:
            for _, group in groupby(visible, lambda entry: _key(entry.path)):
                sample: dict[str, Entry] = {}
                for entry in group:
                    if entry.path in sample:
                        raise DataError(f"{self._spec}: {file}: {entry.path} is there twice")
                    sample[entry.path] = entry
                images = [path for path in sample if path.lower().endswith(IMAGE_SUFFIXES)]
                images = images or [path for path in sample if _is_image(sample[path], raw)]
                if not images:
                    self._others.add(next(iter(sample)))
                for path in images:
                    _, start, size, _ = sample[path]
                    name = path.rpartition("/")[2]
                    if self._request.unlabeled or self._request.labels:
                        yield Image("", name, path, start, size, 0)
                        continue
                    label = self._label_file(sample, path, len(images))
                    content = os.pread(raw.fileno(), label.size, label.start)
                    class_name = self._class_name(label.path, content)
                    yield Image(class_name, name, path, start, size, 0)

    def class_order(self) -> tuple[str, ...] | None:
        """Return the class names by number, None if labels are text; after all images."""
        self._refuse_captions()
        if not self._numbered:
            return None
        return tuple(self._names or class_numbers(self._highest, self._images, self._spec))

    def warnings(self) -> list[str]:
        """Return a line about samples without an image."""
        one, many = "sample has no image and is", "samples have no image and are"
        line = f"{self._spec}: {counted(self._others.count, one, many)} left out: {self._others}"
        return [line] if self._others.count else []

    def _label_file(self, sample: dict[str, Entry], image: str, images: int) -> Entry:
        """Return the member that has the label of an image of a sample."""
        stem = image.rpartition(".")[0]
        found = [sample[f"{stem}{suffix}"] for suffix in _LABELS if f"{stem}{suffix}" in sample]
        if not found and images == 1:
            found = [sample[path] for end in _LABELS for path in sample if path.endswith(end)]
        if not found:
            several = f", and {images} images are called {_key(image)}.*" if images > 1 else ""
            looked = f"looked for {', '.join(_LABELS)}"
            raise DataError(f"{self._spec}: {image} has no label beside it ({looked}){several}")
        entry = found[0]
        if entry.size > _LONGEST:
            raise DataError(f"{self._spec}: {entry.path} has {entry.size} bytes: no label")
        return entry

    def _class_name(self, path: str, content: bytes) -> str:
        """Return the class that a file with a label names."""
        where = f"{self._spec}: {path}"
        place = path[path.rindex(".") :]
        try:
            text = content.decode("utf-8-sig").strip()
            label: object = text
            if place == ".json":
                fields = json_value(text)
                key = next(key for key in _KEYS if key in fields)
                label, place = fields[key], f".json, as {key}"
            str(label).encode()  # ValueError: half of a surrogate pair, which JSON can name
        except (ValueError, TypeError, StopIteration) as error:
            reason = f"none of {', '.join(_KEYS)}" if isinstance(error, StopIteration) else error
            raise DataError(f"{where}: no label ({reason})") from error
        if isinstance(label, list | dict):
            raise DataError(f"{where}: {label!r} for one label: only one an image can be packed")
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        name = "" if label is None else str(label)
        if not name or "\n" in name:
            raise DataError(f"{where}: no label, but {'several lines' if name else 'nothing'}")
        if "/" in name:
            raise DataError(f"{where}: a class with a slash in it: {name!r}")
        self._check_form(where, place, name)
        self._images += 1
        return self._by_number(where, name) if self._numbered else name

    def _check_form(self, where: str, place: str, name: str) -> None:
        numbered = bool(_NUMBER.fullmatch(name))
        if not self._place:
            self._place, self._numbered = place, numbered
            if numbered:
                self._names = classes_beside(self._request.path)
            what = "numbers" if numbered else "names"
            source = " and classes.txt" if self._names else ""
            line = f"read as webdataset samples, their classes are {what} in {place}{source}"
            self._request.report(f"{self._spec}: {line}")
        if place != self._place:
            raise DataError(f"{where}: its label is in {place}, that of others in {self._place}")
        if numbered != self._numbered:
            raise DataError(f"{where}: {name!r}: labels are both numbers and names")
        if not numbered:
            self._classes.add(name)
            if self._images % 1000 == 999:
                self._refuse_captions()

    def _by_number(self, where: str, name: str) -> str:
        # Python refuses to convert thousands of digits.
        label = int(name) if len(name) < _DIGITS else LABEL_LIMIT
        if label == NO_LABEL:
            return ""
        limit = len(self._names) if self._names else LABEL_LIMIT
        if not 0 <= label < limit:
            shown = name if len(name) < _DIGITS else f"{name[:_DIGITS]}..."
            source = " (classes.txt)" if self._names else ""
            raise DataError(f"{where}: label {shown} is not 0 to {limit - 1}{source}")
        self._highest = max(self._highest, label)
        return self._names[label] if self._names else str(label)

    def _refuse_captions(self) -> None:
        if self._place == ".txt" and self._images >= _FEW and 2 * len(self._classes) > self._images:
            what = f"{len(self._classes)} different texts in .txt beside {self._images} images"
            raise DataError(f"{self._spec}: {what}: captions, not classes; see --labels")


def _is_image(entry: Entry, raw: IO[bytes]) -> bool:
    return bool(kind_of(os.pread(raw.fileno(), min(PEEKED, entry.size), entry.start)))


def _key(path: str) -> str:
    """Return the name of a file up to the first dot in its last part."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]
