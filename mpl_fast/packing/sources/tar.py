"""Tar archives as sources: their members are byte ranges."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mpl_fast.errors import DataError
from mpl_fast.packing.image_kinds import PEEKED
from mpl_fast.packing.sources.class_folders import ClassFolders, Entry
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.spool import Stream, archive_errors, decompressed, open_plain, spooled

_BLOCK = 512  # bytes; the unit of a tar file
_SHOWN = 10  # names that an error lists
_PEEKED = 16  # members by which the kind of an archive is recognized
_PEEKED_BYTES = 1 << 24  # in which they end
_HEADER = 1 << 20  # bytes of a header, such as a long name
_DEEPEST = 100  # folders and tars above a tar: each tar is a level of recursion
_PADDING = 1 << 20  # bytes after the end mark that are searched for a second archive


class TarSource(ClassFolders):
    """A tar archive, or a folder in it; a compressed one is unpacked first."""

    kind = "archive"
    has_folders = True

    def __init__(self, request: Request) -> None:
        blocks = decompressed(request.path)
        super().__init__(request, None if blocks is None else spooled(request, blocks))

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return True

    def _entries(self) -> Iterator[Entry]:
        """Yield the members of the folder, named relative to it."""
        yield from tar_entries(self.file, self.request.path, self.request.folder)

    def _head(self, entry: Entry) -> bytes:
        with self.file.open("rb") as raw:
            return os.pread(raw.fileno(), min(PEEKED, entry.size), entry.start)


def tar_entries(file: Path, archive: Path, folder: str) -> Iterator[Entry]:
    """Yield the members of a folder of an archive, "" for all, whose plain form is in file.

    A tar inside the archive (ImageNet's has one for each class) is a folder of its name. Raises
    DataError for links, and when the archive is damaged, truncated or followed by another.
    """
    with archive_errors(archive), file.open("rb") as raw:
        members = _members(raw, 0, raw.seek(0, os.SEEK_END), "", archive)
        yield from in_folder(members, folder, archive)


def in_folder(members: Iterable[Entry], folder: str, archive: Path) -> Iterator[Entry]:
    """Yield those members that are in a folder, named relative to it; DataError if none is."""
    folder = clean_name(folder)
    prefix = f"{folder}/" if folder else ""
    found = False
    tops: dict[str, None] = {}
    for path, start, size, _ in members:
        if path.startswith(prefix):
            found = True
            yield Entry(path[len(prefix) :], start, size)
        elif len(tops) < _SHOWN:
            tops[path.partition("/")[0]] = None
    if prefix and not found:
        where = f"in this archive; it holds {', '.join(tops)}"
        raise DataError(f"{archive}: no folder {folder!r} {where}")


def first_members(path: Path) -> list[str]:
    """Return the names of a few first members of a tar, compressed or not; [] if it is none.

    The last one may be a tar, or large, so that what follows would have to be decompressed.
    """
    names: list[str] = []
    with suppress(DataError), open_tar(path) as tar:
        for item in islice(tar, _PEEKED):
            names.append(clean_name(item.name))
            if item.name.endswith(".tar") or item.offset_data + item.size > _PEEKED_BYTES:
                break
    return names


@contextmanager
def open_tar(path: Path, most: int = _HEADER) -> Iterator[tarfile.TarFile]:
    """Open a tar, compressed or not, of which at most that many bytes are read together."""
    with open_plain(path) as stream, _open(stream, most) as tar:
        yield tar


def _open(stream: Stream, most: int) -> tarfile.TarFile:
    file: Any = _Bounded(stream, most)
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")


class _Bounded:
    """A file for tarfile, which reads a header of any size as a whole."""

    def __init__(self, file: Stream, most: int) -> None:
        self._file = file
        self._most = most
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > self._most:
            raise tarfile.ReadError(f"{size} bytes to be read at once, more than {self._most}")
        return self._file.read(size)


def clean_name(name: str) -> str:
    """Return a path inside an archive without the parts "", "." and ".."."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _members(raw: IO[bytes], start: int, stop: int, prefix: str, shown: Path) -> Iterator[Entry]:
    """Yield the members of the tar in the bytes from start to stop; offsets count from byte 0.

    A tar inside another has no end of file: without stop, a truncated one would run on.
    """
    raw.seek(start)
    name = prefix
    with _open(raw, _HEADER) as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # 1 KB an image, never used
            if tar.offset > stop or item.size < 0:
                break
            name = (prefix + clean_name(item.name)).rstrip("/")  # "./" is the tar's own folder
            if item.issym() or item.islnk() or item.issparse():
                raise DataError(f"{shown}: {name} is a link or sparse; pack from the unpacked tree")
            if item.isreg() and name.endswith(".tar"):
                if name.count("/") >= _DEEPEST:
                    raise DataError(f"{shown}: {name} is in more than {_DEEPEST} folders or tars")
                inner = f"{name.removesuffix('.tar')}/"
                yield Entry(inner[:-1], 0, -1)
                end = item.offset_data + item.size
                yield from _members(raw, item.offset_data, end, inner, shown)
            elif item.isreg():
                yield Entry(name, item.offset_data, item.size)
            elif item.isdir() and name:
                yield Entry(name, 0, -1)
        end = tar.offset
    _require_end(raw, end, stop, f"{shown}: damaged or cut short after {name or 'its start'}")


def _require_end(raw: IO[bytes], end: int, stop: int, fault: str) -> None:
    """DataError unless the tar's end mark is at end and no other tar follows it before stop."""
    # tarfile stops silently at a damaged header, so the end mark is checked here.
    raw.seek(end)
    if end + _BLOCK > stop or raw.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"{fault} (no end mark)")
    padding = raw.read(min(stop - end - _BLOCK, _PADDING))
    for at in range(0, len(padding), _BLOCK):
        block = padding[at : at + _BLOCK]
        if any(block):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return  # padding that some writers leave after the end mark
            # Joined with `cat`: tar itself would stop here silently.
            raise DataError(f"{fault}: a second archive begins at byte {end + _BLOCK + at}")
