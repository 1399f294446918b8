"""Spool files: what a compressed source contains, so that it can be read in any order."""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Literal, TypeAlias

from mpl_fast.atomic import atomic_path
from mpl_fast.errors import DataError, output_errors
from mpl_fast.packing.sources.source import Request

Stream: TypeAlias = IO[bytes] | gzip.GzipFile
_Opener: TypeAlias = Callable[[Path, Literal["rb"]], AbstractContextManager[Stream]]
# A block or end mark follows the level: an uncompressed tar may begin with a file name "BZh...".
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
# Images barely shrink in an archive: what grows beyond this may be made to fill the disk.
_RATIO, _ALWAYS = 100, 1 << 30  # times; bytes
_DAMAGE = (
    *(tarfile.TarError, lzma.LZMAError, zlib.error, EOFError),
    *(ValueError, OverflowError),  # tarfile uses any number in a damaged header as an offset
)


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading the archive at path into a DataError that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or not a tar archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def spooled(
    request: Request,
    blocks: Iterable[bytes | memoryview],
    files: Sequence[Path] = (),
    part: str = "",
) -> Path:
    """Return a file of these blocks in the work folder, made once and kept.

    blocks are the content of the request's path, or of that part of these files, in a form of which
    images are byte ranges. The time of the file changes with any of these: it is the time of the
    only one, or a number from the sizes and times of several; the same when made again. Raises
    OutputError when the work folder is full.
    """
    work = request.work
    states = [(path, path.stat()) for path in files or (request.path,)]
    lines = [f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}" for path, state in states]
    identity = "\n".join([*lines, *filter(None, [part])])
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()
    spool = work / f"spool-{digest[:16]}.{'images' if part else 'tar'}"
    if not spool.exists():
        what = request.spec if part else request.path
        request.report(f"unpacking {what} into a temporary file in {work}")
        with output_errors(work), atomic_path(spool) as temporary:
            limit = max(_ALWAYS, _RATIO * sum(state.st_size for _, state in states))
            with temporary.open("wb") as file:
                for block in blocks:
                    file.write(block)
                    if file.tell() > limit:
                        fault = f"it unpacks to more than {_RATIO} times its size"
                        raise DataError(f"{what}: {fault}; unpack it yourself if that is right")
            stamp = _stamp([state for _, state in states])
            os.utime(temporary, ns=(stamp, stamp))
    return spool


def _stamp(states: Sequence[os.stat_result]) -> int:
    if len(states) == 1:
        return states[0].st_mtime_ns
    values = repr([(state.st_size, state.st_mtime_ns) for state in states])
    return int.from_bytes(hashlib.sha256(values.encode()).digest()[:7], "big")


def decompressed(path: Path) -> Iterator[bytes] | None:
    """Return blocks of the uncompressed content; None if the file is not compressed."""
    return _blocks(path) if _opener(path) else None


def _blocks(path: Path) -> Iterator[bytes]:
    with open_plain(path) as stream:
        while block := stream.read(1 << 20):
            yield block


@contextmanager
def open_plain(path: Path) -> Iterator[Stream]:
    """Open the uncompressed content of a file, which may be compressed."""
    with archive_errors(path), (_opener(path) or Path.open)(path, "rb") as stream:
        yield stream


def _opener(path: Path) -> _Opener | None:
    """Return what opens a compressed file; None if it is not compressed."""
    with archive_errors(path), path.open("rb") as raw:
        start = raw.read(10)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open
    if start.startswith(b"\x1f\x8b"):
        return gzip.open
    return bz2.open if _BZIP2.match(start) else None
