"""Tar archives as byte ranges: a compressed one is unpacked once into a spool file."""

import bz2
import gzip
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from mpl_fast.errors import DataError

_BLOCK = 512  # bytes; the unit of a tar file


class Member(NamedTuple):
    """A file or folder in an archive; name has no leading "./" and no trailing "/"."""

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
            try:
                tar = self._uncompressed(path)
                self._archives[real] = Archive(tar, list_members(tar, path))
            except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
                raise DataError(f"{path}: damaged or not a tar archive ({error})") from error
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from error
        return self._archives[real]

    def _uncompressed(self, path: Path) -> Path:
        """Return path itself when it is no compressed file, else a spool file with its content."""
        with path.open("rb") as raw:
            start = raw.read(6)
        stream: IO[bytes] | gzip.GzipFile
        if start.startswith(b"\xfd7zXZ\0"):
            stream = lzma.open(path)  # noqa: SIM115 (closed below)
        elif start.startswith(b"\x1f\x8b"):
            stream = gzip.open(path)  # noqa: SIM115
        elif start.startswith(b"BZh"):
            stream = bz2.open(path)  # noqa: SIM115
        else:
            return path
        self._say(f"unpacking {path} once into a temporary file")
        spool = self._spool_folder / f".spool-{len(self._spools)}.tmp"
        self._spools.append(spool)
        with stream, spool.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
        return spool


def list_members(tar_path: Path, shown: Path) -> list[Member]:
    """Return the files and folders of an uncompressed tar file; `shown` names it in errors.

    A tar inside it, as ImageNet's archive has one for each class, counts as a folder of its name.
    """
    with tar_path.open("rb") as raw:
        return list(_members(raw, 0, "", shown))


def _members(raw: IO[bytes], start: int, prefix: str, shown: Path) -> Iterator[Member]:
    """Yield the members of the tar that starts at byte `start`, their offsets counted from 0."""
    raw.seek(start)
    name = prefix
    with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # 1 KB an image, never asked for
            name = "/".join(part for part in item.name.split("/") if part not in ("", "."))
            name = prefix + name
            if item.issym() or item.islnk() or item.issparse():
                raise DataError(f"{shown}: {name} is a link or sparse; pack from the unpacked tree")
            if item.isreg() and name.endswith(".tar"):
                inner = f"{name.removesuffix('.tar')}/"
                yield from _members(raw, item.offset_data, inner, shown)
            elif item.isreg():
                yield Member(name, item.offset_data, item.size)
            elif item.isdir() and name:
                yield Member(name, 0, -1)
        end = tar.offset
    # tarfile ends without a word at a damaged header, so the end mark is looked for.
    raw.seek(end)
    if raw.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"{shown}: damaged or cut short after {name or 'its start'} (no end mark)")
