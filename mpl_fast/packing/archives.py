"""Tar archives as byte ranges: a compressed one is unpacked once into a spool file."""

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from mpl_fast.errors import DataError, output_errors

_BLOCK = 512  # bytes; the unit of a tar file
# Its level is followed by the mark of a block, or of the end: a tar may begin with a name "BZh".
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")


class Member(NamedTuple):
    """A file or folder in an archive; name is clean, as clean_name returns it."""

    name: str
    offset: int  # of its first byte in the uncompressed archive
    size: int  # bytes; -1 for a folder


@dataclass(frozen=True)
class Archive:
    """An uncompressed tar file and its members."""

    path: Path
    members: list[Member]


class Archives:
    """The archives of one run, each read once; leaving the context removes the spool files."""

    def __init__(self, spool_folder: Path, say: Callable[[str], None]) -> None:
        self._spool_folder = spool_folder
        self._say = say
        self._archives: dict[Path, Archive] = {}
        self._spools: list[Path] = []

    def __enter__(self) -> "Archives":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for spool in self._spools:
            spool.unlink(missing_ok=True)

    def open(self, path: Path) -> Archive:
        """Return the archive at path; DataError when it cannot be read to its end."""
        real = path.resolve()
        if real not in self._archives:
            tar = self._uncompressed(path)
            with _archive_errors(path):
                self._archives[real] = Archive(tar, list_members(tar, path))
        return self._archives[real]

    def _uncompressed(self, path: Path) -> Path:
        """Return path itself when it is no compressed file, else a spool file with its content."""
        with _archive_errors(path):
            stream = _decompressor(path)
        if stream is None:
            return path
        self._say(f"unpacking {path} once into a temporary file")
        spool = self._spool_folder / f".spool-{len(self._spools)}.tmp"
        self._spools.append(spool)
        # A full disk is the fault of the spool's folder, and damage that of the archive.
        with stream, output_errors(self._spool_folder), spool.open("wb") as copy:
            while chunk := _read(stream, path):
                copy.write(chunk)
        return spool


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Turn what reading the archive at path raises into one line about it."""
    try:
        yield
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or not a tar archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _decompressor(path: Path) -> IO[bytes] | gzip.GzipFile | None:
    """Return a reader of the content of a compressed file; None when it is not compressed."""
    with path.open("rb") as raw:
        start = raw.read(10)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    return bz2.open(path) if _BZIP2.match(start) else None


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path) -> bytes:
    with _archive_errors(path):
        return stream.read(1 << 20)


def clean_name(name: str) -> str:
    """Return a path inside an archive without "", "." and ".." among its parts."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def list_members(tar_path: Path, shown: Path) -> list[Member]:
    """Return the files and folders of an uncompressed tar file; `shown` names it in errors.

    A tar inside it, as ImageNet's archive has one for each class, counts as a folder of its name.
    """
    with tar_path.open("rb") as raw:
        return list(_members(raw, 0, raw.seek(0, os.SEEK_END), "", shown))


def _members(raw: IO[bytes], start: int, stop: int, prefix: str, shown: Path) -> Iterator[Member]:
    """Yield the members of the tar in the bytes from start to stop, their offsets counted from 0.

    A tar inside another has no end of file of its own: only stop keeps a cut one from going on.
    """
    raw.seek(start)
    name = prefix
    with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # 1 KB an image, never asked for
            if tar.offset > stop:
                break
            name = prefix + clean_name(item.name)
            if item.issym() or item.islnk() or item.issparse():
                raise DataError(f"{shown}: {name} is a link or sparse; pack from the unpacked tree")
            if item.isreg() and name.endswith(".tar"):
                inner = f"{name.removesuffix('.tar')}/"
                yield Member(inner[:-1], 0, -1)
                end = item.offset_data + item.size
                yield from _members(raw, item.offset_data, end, inner, shown)
            elif item.isreg():
                yield Member(name, item.offset_data, item.size)
            elif item.isdir() and name:
                yield Member(name, 0, -1)
        end = tar.offset
    # tarfile ends without a word at a damaged header, so the end mark is looked for.
    raw.seek(end)
    if end + _BLOCK > stop or raw.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"{shown}: damaged or cut short after {name or 'its start'} (no end mark)")
