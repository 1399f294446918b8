"""Unpacks a compressed archive into a spool file, whose byte ranges can be read in any order."""

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
from typing import IO

from mpl_fast.atomic import atomic_path
from mpl_fast.errors import DataError, output_errors

# A block or end mark follows the level: an uncompressed tar may begin with a file name "BZh...".
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
# The last two: tarfile uses any number in a damaged header as an offset.
_DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, OverflowError)


@contextmanager
def archive_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading the archive at path into a DataError that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or not a tar archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def unpacked(path: Path, work: Path, report: Callable[[str], None]) -> Path:
    """Return the uncompressed archive: path itself if it is not compressed, else a spool file.

    That is in the folder `work`, made once and kept. It gets its archive's modification time, so
    that it is the same when made again. Raises DataError when the archive is damaged, OutputError
    when `work` is full.
    """
    with archive_errors(path):
        stream = _decompressor(path)
        state = path.stat()
    if stream is None:
        return path
    identity = f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()
    spool = work / f"spool-{digest[:16]}.tar"
    with stream:
        if not spool.exists():
            report(f"unpacking {path} into a temporary file in {work}")
            # A full disk is an error of the spool's folder, damage an error of the archive.
            with output_errors(work), atomic_path(spool) as temporary:
                with temporary.open("wb") as copy:
                    while block := _read(stream, path):
                        copy.write(block)
                os.utime(temporary, ns=(state.st_mtime_ns, state.st_mtime_ns))
    return spool


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
