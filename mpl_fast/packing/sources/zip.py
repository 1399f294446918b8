"""Zip archives as sources: their members are byte ranges, decompressed when they are read."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.image_kinds import IMAGE_SUFFIXES, PEEKED
from mpl_fast.packing.sources.class_folders import ANNOTATIONS, ClassFolders, Entry
from mpl_fast.packing.sources.tar import clean_name, in_folder

# Layouts: APPNOTE.TXT of PKWARE, 4.3.
_LOCAL = struct.Struct("<4s2xHH4xI8xHH")  # mark, flags, method, crc32, lengths of name and extra
_MEMBER = struct.Struct("<4sBB2xHH8xIIHHH4xII")
_END = struct.Struct("<4sHH4xIIH")  # mark, disk, disk of the directory, its size and offset, ..
_LOCATOR = struct.Struct("<4s4xQ4x")
_END64 = struct.Struct("<4s36xQQ")  # mark, size and offset of the directory
_COMMENT = 1 << 16  # bytes; the longest after the end record
_WORD, _LONG = 0xFFFF, 0xFFFFFFFF  # the value is in the 64-bit form
_ENCRYPTED, _CRC_FOLLOWS, _UTF8 = 1, 8, 1 << 11  # flags
_STORED, _DEFLATED = 0, 8  # methods
_BLOCK_HEAD = 1024  # bytes; more than the codes that precede the first byte of a deflated file
_UNIX, _LINK = 3, 0o120000
_SIZE_LIMIT = 1 << 29  # bytes of a member that is read; more than a record holds


class _Member(NamedTuple):
    name: str
    flags: int
    method: int
    is_link: bool
    start: int  # of its local header
    size: int  # bytes of its data, compressed
    whole: int  # the same uncompressed, as declared


class ZipSource(ClassFolders):
    """A zip archive of class folders, or a folder in it."""

    kind = "zip"
    has_folders = True
    behind = 8  # the checksum, where it follows the data; after the mark b"PK\7\x08" or without it

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\3\4", b"PK\5\6")

    @staticmethod
    def decode(stored: bytes) -> bytes:
        """Return the content of a member from its local header, its data and what is behind."""
        mark, flags, method, crc, name, extra = _LOCAL.unpack_from(stored)
        if mark != b"PK\3\4":
            raise DataError("damaged zip archive: no member begins here")
        data = stored[_LOCAL.size + name + extra : -ZipSource.behind]
        checksums = [crc]
        if flags & _CRC_FOLLOWS:
            checksums += struct.unpack("<II", stored[-ZipSource.behind :])
        if method == _DEFLATED:
            try:
                inflater = zlib.decompressobj(-zlib.MAX_WBITS)
                data = inflater.decompress(data, _SIZE_LIMIT)
                if not inflater.eof:
                    raise DataError("damaged zip archive: a member is cut short or too large")
            except zlib.error as error:
                raise DataError(f"damaged zip archive ({error})") from error
        if zlib.crc32(data) not in checksums:
            raise DataError("damaged zip archive: wrong checksum of a member")
        return data

    def _entries(self) -> Iterator[Entry]:
        with _errors(self.file), self.file.open("rb") as raw:
            stop = raw.seek(0, os.SEEK_END)
            entries = (_entry(raw, member, self.file, stop) for member in _members(raw, self.file))
            yield from in_folder(entries, self.request.folder, self.file)

    def _head(self, entry: Entry) -> bytes:
        """Return the first bytes of a member, b"" if it is encrypted or not deflated."""
        with _errors(self.file), self.file.open("rb") as raw:
            local = os.pread(raw.fileno(), _LOCAL.size, entry.start)
            _, flags, method, _, name, extra = _LOCAL.unpack(local)
            skipped = _LOCAL.size + name + extra
            size = min(_BLOCK_HEAD, entry.size - skipped)
            data = os.pread(raw.fileno(), size, entry.start + skipped)
        if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
            return b""
        if method == _STORED:
            return data[:PEEKED]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, PEEKED)
        except zlib.error as error:
            raise DataError(f"{self.file}: damaged zip archive: {entry.path} ({error})") from error

    def _annotations(self) -> bytes | None:
        for entry in self._entries():
            if entry.path == ANNOTATIONS:
                with _errors(self.file), self.file.open("rb") as raw:
                    stored = os.pread(raw.fileno(), entry.size + self.behind, entry.start)
                try:
                    return self.decode(stored)
                except DataError as error:
                    raise DataError(f"{self.file}: {entry.path}: {error}") from error
        return None


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except struct.error as error:
        raise DataError(f"{path}: damaged zip archive (its directory is cut short)") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _entry(raw: IO[bytes], member: _Member, archive: Path, stop: int) -> Entry:
    name = clean_name(member.name)
    if member.name.endswith("/"):
        return Entry(name, 0, -1)
    if member.is_link:
        raise DataError(f"{archive}: {name} is a link; pack from the unpacked tree")
    if not 0 <= member.start <= member.start + _LOCAL.size + member.size <= stop:
        raise DataError(f"{archive}: damaged zip archive: {name} ends after the file")
    is_image = name.lower().endswith(IMAGE_SUFFIXES)
    is_read = is_image or name.rpartition("/")[2] == ANNOTATIONS
    if is_read and (most := max(member.size, member.whole)) > _SIZE_LIMIT:
        raise DataError(f"{archive}: {name} has {most} bytes, more than {_SIZE_LIMIT}")
    if is_image:
        if member.flags & _ENCRYPTED:
            raise DataError(f"{archive}: {name} is encrypted; pack from the unpacked tree")
        if member.method not in (_STORED, _DEFLATED):
            fault = f"is compressed by method {member.method}, not deflate"
            raise DataError(f"{archive}: {name} {fault}; pack from the unpacked tree")
    mark, *_, name_length, extra = _LOCAL.unpack(os.pread(raw.fileno(), _LOCAL.size, member.start))
    if mark != b"PK\3\4":
        raise DataError(f"{archive}: damaged zip archive: {name} is not where it should be")
    size = _LOCAL.size + name_length + extra + member.size
    if member.start + size > stop:
        raise DataError(f"{archive}: damaged zip archive: {name} ends after the file")
    return Entry(name, member.start, size)


def _members(raw: IO[bytes], archive: Path) -> Iterator[_Member]:
    """Yield the members in the order of the directory, which is not held in memory."""
    at, stop, shift = _directory(raw, archive)
    total, length_of_file = 0, raw.seek(0, os.SEEK_END)
    raw.seek(at)
    while at < stop:
        mark, _, system, flags, method, size, whole, *lengths, attributes, start = _MEMBER.unpack(
            raw.read(_MEMBER.size)
        )
        name, extra, _ = (raw.read(length) for length in lengths)
        if mark != b"PK\1\2":
            raise DataError(f"{archive}: damaged zip archive: its directory ends at byte {at}")
        at += _MEMBER.size + sum(lengths)
        whole, size, start = _long_values(extra, whole, size, start)
        is_link = system == _UNIX and attributes >> 16 & 0o170000 == _LINK
        total += size
        if size <= length_of_file < total:  # one range as many members, each to be decompressed
            raise DataError(f"{archive}: damaged zip archive: its members overlap")
        yield _Member(_text(name, flags), flags, method, is_link, start + shift, size, whole)


def _directory(raw: IO[bytes], archive: Path) -> tuple[int, int, int]:
    """Return start and end of the directory, and by how much offsets are too small."""
    stop = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, stop - _END.size - _COMMENT))
    tail = raw.read()
    found = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    if found < 0:
        raise DataError(f"{archive}: damaged or not complete: no zip directory at its end")
    _, disk, first_disk, size, offset, _ = _END.unpack_from(tail, found)
    end = stop - len(tail) + found
    if disk not in (0, _WORD) or first_disk not in (0, _WORD):
        raise DataError(f"{archive}: one of several parts of a zip archive; join them first")
    locator = os.pread(raw.fileno(), _LOCATOR.size, max(0, end - _LOCATOR.size))
    if locator.startswith(b"PK\6\7"):
        _, at = _LOCATOR.unpack(locator)
        at = min(at, stop)  # a damaged one may be too large to be an offset
        mark, long_size, long_offset = _END64.unpack(os.pread(raw.fileno(), _END64.size, at))
        if mark == b"PK\6\6":
            end, size, offset = at, long_size, long_offset
    if size + offset > end:
        raise DataError(f"{archive}: damaged zip archive: its directory is not where it should be")
    return end - size, end, end - size - offset


def _long_values(extra: bytes, whole: int, size: int, start: int) -> tuple[int, int, int]:
    """Return the sizes and start, from the extra field where they have more than 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            whole = next(values, whole) if whole == _LONG else whole
            size = next(values, size) if size == _LONG else size
            start = next(values, start) if start == _LONG else start
        at += 4 + length
    return whole, size, start


def _text(name: bytes, flags: int) -> str:
    """Return a name: UTF-8 if its flag is set or it can be, else the code page of DOS."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("utf-8", "surrogateescape") if flags & _UTF8 else name.decode("cp437")
