"""Folders of image files as sources."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.image_kinds import PEEKED
from mpl_fast.packing.sources.class_folders import ANNOTATIONS, ClassFolders, Entry
from mpl_fast.packing.sources.source import FOLDER


class _Folder(NamedTuple):
    prefix: str  # of the names in it, relative to the source
    path: str
    chain: tuple[tuple[int, int], ...]  # (device, inode) of the folders from the source to here


class FolderSource(ClassFolders):
    """Image files in class folders."""

    kind = FOLDER

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return path.is_dir()

    def _annotations(self) -> bytes | None:
        file = self.file / ANNOTATIONS
        try:
            return file.read_bytes() if file.is_file() else None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error

    def _head(self, entry: Entry) -> bytes:
        path = self.file / entry.path
        try:
            with path.open("rb") as file:
                return file.read(PEEKED)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error

    def _entries(self) -> Iterator[Entry]:
        """Yield all files and folders; links are followed, a loop of links is an error."""
        pending = [_Folder("", str(self.file), (_identity(self.file.stat()),))]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(folder.path) as items:
                    for item in items:
                        if item.name.startswith("."):
                            continue
                        path = folder.prefix + item.name
                        state = item.stat()
                        if item.is_file():
                            # As Entry(...), in a third of the time.
                            yield Entry._make((path, -1, state.st_size, state.st_mtime_ns))
                            continue
                        if not item.is_dir():
                            raise DataError(f"{item.path}: neither a file nor a folder")
                        if _identity(state) in folder.chain:
                            fault = "this link leads back to a folder above it"
                            raise DataError(f"{item.path}: {fault}")
                        chain = (*folder.chain, _identity(state))
                        pending.append(_Folder(f"{path}/", item.path, chain))
                        yield Entry(path, -1, -1)
            except OSError as error:
                raise DataError(f"{error.filename or folder.path}: {error.strerror}") from error


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino
