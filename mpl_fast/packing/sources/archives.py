"""Tar archives as byte ranges: a compressed one is unpacked once into a spool file."""

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

from mpl_fast.errors import DataError, output_errors

_BLOCK = 512  # bytes; the unit of a tar file
_SHOWN = 10  # names that an error lists
_PADDING = 1 << 20  # bytes after the end mark that are searched for a second archive
# Its level is followed by the mark of a block, or of the end: a tar may begin with a name "BZh".
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")

# The last two: tarfile takes any number in a damaged header for an offset.
_DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, OverflowError)


class Member(NamedTuple):
    """A file or folder in an archive; name is clean, as clean_name returns it."""

    name: str
    start: int  # of its first byte in the uncompressed archive
    size: int  # bytes; -1 for a folder


class Spools:
    """The uncompressed contents of compressed archives: files in `work`, made once and kept."""

    def __init__(self, work: Path, say: Callable[[str], None]) -> None:
        self._work = work
        self._say = say

    def get(self, path: Path) -> Path:
        """Return a file with the content of path: path itself when it is not compressed.

        A spool file has its archive's modification time, so that it looks the same when it has to
        be made again. DataError when the archive is damaged, OutputError when `work` is full.
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
            self._say(f"unpacking {path} once into {self._work}")
            with stream:
                _unpack(stream, path, spool, state.st_mtime_ns)
        stream.close()
        return spool


def _unpack(stream: IO[bytes] | gzip.GzipFile, path: Path, spool: Path, stamp: int) -> None:
    """Write what stream holds to spool: complete and on disk, or not at all."""
    temporary = spool.with_name(f"{spool.name}.tmp")
    try:
        # A full disk is the fault of the spool's folder, and damage that of the archive.
        with output_errors(spool.parent), temporary.open("wb") as copy:
            while chunk := _read(stream, path):
                copy.write(chunk)
            copy.flush()
            os.utime(temporary, ns=(stamp, stamp))
            os.fsync(copy.fileno())
            temporary.replace(spool)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Turn what reading the archive at path raises into one line about it."""
    try:
        yield
    except _DAMAGE as error:
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
    with archive_errors(path):
        return stream.read(1 << 20)


def clean_name(name: str) -> str:
    """Return a path inside an archive without "", "." and ".." among its parts."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def members(tar_path: Path, shown: Path, folder: str = "") -> Iterator[Member]:
    """Yield what lies in a folder of an uncompressed tar file, named from there on.

    `shown` names the archive in errors, `folder` is a clean name, "" for the whole archive. A tar
    inside it, as ImageNet's archive has one for each class, counts as a folder of its name.
    DataError at a link, and where the archive is damaged, cut short or followed by another.
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
    """Yield the members of the tar in the bytes from start to stop, their starts counted from 0.

    A tar inside another has no end of file of its own: only stop keeps a cut one from going on.
    """
    raw.seek(start)
    name = prefix
    with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # 1 KB an image, never asked for
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
    # tarfile ends without a word at a damaged header, so the end mark is looked for.
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
                return  # what some writers leave behind the end mark means nothing
            # Joined with `cat`: tar itself would stop here without a word.
            raise DataError(f"{fault}: a second archive begins at byte {end + _BLOCK + at}")
