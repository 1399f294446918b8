"""Lists the members of tar archives as byte ranges; unpacks compressed ones into spool files."""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from mpl_fast.atomic import atomic_path
from mpl_fast.errors import DataError, output_errors

_BLOCK = 512  # bytes; the unit of a tar file
_SHOWN = 10  # names that an error lists
_PADDING = 1 << 20  # bytes after the end mark that are searched for a second archive
# A block or end mark follows the level: an uncompressed tar may begin with a file name "BZh...".
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")

# The last two: tarfile uses any number in a damaged header as an offset.
_DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, OverflowError)


class Member(NamedTuple):
    """A file or folder in an archive; name is clean, as clean_name returns it."""

    name: str
    start: int  # of its first byte in the uncompressed archive
    size: int  # bytes; -1 for a folder


class Spools:
    """Uncompressed copies of compressed archives, in the folder `work`, made once and kept."""

    def __init__(self, work: Path, report: Callable[[str], None]) -> None:
        self._work = work
        self._report = report

    def get(self, path: Path) -> Path:
        """Return the uncompressed archive: path itself if it is not compressed.

        A spool file gets its archive's modification time, so that it is the same when made again.
        Raises DataError when the archive is damaged, OutputError when `work` is full.
        """
        with archive_errors(path):
            stream = _decompressor(path)
            state = path.stat()
        if stream is None:
            return path
        identity = f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
        digest = hashlib.sha256(os.fsencode(identity)).hexdigest()
        spool = self._work / f"spool-{digest[:16]}.tar"
        if not spool.exists():
            self._report(f"unpacking {path} once into {self._work}")
            with stream:
                _unpack(stream, path, spool, state.st_mtime_ns)
        stream.close()
        return spool


def _unpack(stream: IO[bytes] | gzip.GzipFile, path: Path, spool: Path, stamp: int) -> None:
    """Write the content of stream to spool, atomically."""
    # A full disk is an error of the spool's folder, damage an error of the archive.
    with output_errors(spool.parent), atomic_path(spool) as temporary:
        with temporary.open("wb") as copy:
            while block := _read(stream, path):
                copy.write(block)
        os.utime(temporary, ns=(stamp, stamp))


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading the archive at path into a DataError that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or not a tar archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _decompressor(path: Path) -> IO[bytes] | gzip.GzipFile | None:
    """Return a stream of the uncompressed content; None if the file is not compressed."""
    with path.open("rb") as raw:
        start = raw.read(10)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    return bz2.open(path) if _BZIP2.match(start) else None


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path) -> bytes:
    with archive_errors(path):
        return stream.read(1 << 20)


def clean_name(name: str) -> str:
    """Return a path inside an archive without the parts "", "." and ".."."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def members(tar_path: Path, shown: Path, folder: str = "") -> Iterator[Member]:
    """Yield the members of a folder of an uncompressed tar file, named relative to it.

    `shown` names the archive in errors, `folder` is a clean name, "" for the whole archive. A tar
    inside the archive (ImageNet's has one for each class) counts as a folder of its name. Raises
    DataError for links, and when the archive is damaged, truncated or followed by another.
    """
    prefix = f"{folder}/" if folder else ""
    found = False
    tops: dict[str, None] = {}
    with archive_errors(shown), tar_path.open("rb") as raw:
        for member in _members(raw, 0, raw.seek(0, os.SEEK_END), "", shown):
            if member.name.startswith(prefix):
                found = True
                yield member._replace(name=member.name[len(prefix) :]) if prefix else member
            elif len(tops) < _SHOWN:
                tops[member.name.partition("/")[0]] = None
    if prefix and not found:
        raise DataError(
            f"{shown}: no folder {folder!r} in this archive; it holds {', '.join(tops)}"
        )


def _members(raw: IO[bytes], start: int, stop: int, prefix: str, shown: Path) -> Iterator[Member]:
    """Yield the members of the tar in the bytes from start to stop; offsets count from byte 0.

    A tar inside another has no end of file: without stop, a truncated one would run on.
    """
    raw.seek(start)
    name = prefix
    with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # 1 KB an image, never used
            if tar.offset > stop or item.size < 0:
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
