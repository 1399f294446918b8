"""Where images come from: a class-folder tree or an archive, seen as a list of byte ranges."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.packing.archives import Archives, clean_name
from mpl_fast.packing.first_few import first_few

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFile(NamedTuple):
    """One image: its class, its file name, and the byte range that holds it."""

    class_name: str
    name: str
    path: str
    offset: int
    size: int  # bytes

    @property
    def key(self) -> str:
        """Return `class/name`, unique within a source."""
        return f"{self.class_name}/{self.name}"


@dataclass(frozen=True)
class Place:
    """What a --src or --val text names: a folder, an archive, or a folder inside an archive."""

    spec: str
    path: Path
    folder: str = ""  # inside the archive; "" is all of it


@dataclass(frozen=True)
class Source:
    """The images of one place, sorted by `class/name`, and what was odd about it."""

    place: Place
    images: list[ImageFile]
    warnings: list[str]
    # Newest change of what was listed, seconds since the epoch. Times in the future are left out:
    # they tell nothing about what came first.
    modified: float


class _Entry(NamedTuple):
    relative: str  # with "/" between its parts
    path: str
    offset: int
    size: int  # bytes; -1 for a folder
    modified: float


class _Folder(NamedTuple):
    prefix: str  # of the names in it, relative to the source
    path: str
    chain: tuple[tuple[int, int], ...]  # the folders from the source to this one, as identities


def find_place(spec: str) -> Place:
    """Return what spec (DIR, ARCHIVE or ARCHIVE:FOLDER) names; DataError when it does not exist."""
    path = Path(spec)
    before, colon, folder = spec.rpartition(":")
    try:
        if path.exists():
            return Place(spec, path)
        if colon and Path(before).is_dir():
            raise DataError(f"{spec}: {before} is a folder; write {before}/{folder}")
        if colon and Path(before).is_file():
            return Place(spec, Path(before), clean_name(folder))
    except OSError as error:
        raise DataError(f"{spec}: {error.strerror}") from error
    raise DataError(f"{spec}: no such folder or archive")


def read_source(place: Place, archives: Archives) -> Source:
    """List the images of place; DataError when there is none or the place cannot be used."""
    if place.path.is_dir():
        entries = list(_folder_entries(place.path))
    else:
        entries = list(_archive_entries(place, archives))
    entries = [entry for entry in entries if not _is_hidden(entry.relative)]
    files = [entry for entry in entries if entry.size >= 0]
    chosen = [entry for entry in files if entry.relative.lower().endswith(IMAGE_SUFFIXES)]
    if not chosen:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{place.spec}: no image found (looked for {suffixes} in class folders)")
    images = sorted(_image(place, entry) for entry in chosen)
    _require_unique(place, images)
    now = time.time()
    return Source(
        place,
        images,
        [
            *_warn_of_others(place, files),
            *_warn_of_empty_folders(place, entries),
            *_warn_of_merged_classes(place, chosen),
        ],
        max((entry.modified for entry in entries if entry.modified <= now), default=0.0),
    )


def _folder_entries(root: Path) -> Iterator[_Entry]:
    """Yield the files and folders below root; links are followed, a loop of links is an error."""
    pending = [_Folder("", str(root), (_identity(root.stat()),))]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder.path) as found:
                visible = [(item, item.stat()) for item in found if item.name[0] != "."]
        except OSError as error:
            raise DataError(f"{error.filename or folder.path}: {error.strerror}") from error
        for item, state in visible:
            relative = folder.prefix + item.name
            size = state.st_size
            if item.is_dir():
                if _identity(state) in folder.chain:
                    raise DataError(f"{item.path}: this link leads back to a folder above it")
                chain = (*folder.chain, _identity(state))
                pending.append(_Folder(f"{relative}/", item.path, chain))
                size = -1
            elif not item.is_file():
                raise DataError(f"{item.path}: neither a file nor a folder")
            yield _Entry(relative, item.path, 0, size, state.st_mtime)


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _archive_entries(place: Place, archives: Archives) -> Iterator[_Entry]:
    """Yield what lies in the place's folder of its archive, named from that folder on."""
    archive = archives.open(place.path)
    modified = place.path.stat().st_mtime
    prefix = f"{place.folder}/" if place.folder else ""
    found = False
    for member in archive.members:
        if not member.name.startswith(prefix):
            continue
        found = True
        relative = member.name.removeprefix(prefix)
        yield _Entry(relative, str(archive.path), member.offset, member.size, modified)
    if not found:
        tops = Counter(member.name.partition("/")[0] for member in archive.members)
        raise DataError(
            f"{place.path}: no folder {place.folder!r} in this archive; it holds {first_few(tops)}"
        )


def _is_hidden(relative: str) -> bool:
    return relative.startswith(".") or "/." in relative


def _image(place: Place, entry: _Entry) -> ImageFile:
    parts = entry.relative.split("/")
    if len(parts) < 2:
        raise DataError(f"{place.spec}: {entry.relative} lies outside any class folder")
    class_name, name = parts[-2:]
    if any(character in class_name + name for character in "\t\n\r"):
        raise DataError(f"{place.spec}: {entry.relative!r} has a tab or line break in its name")
    return ImageFile(class_name, name, entry.path, entry.offset, entry.size)


def _require_unique(place: Place, images: list[ImageFile]) -> None:
    counts = Counter(image.key for image in images)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{place.spec}: {len(twice)} names occur more than once as class/name: "
            f"{first_few(twice)}; does it hold several splits? Then name one folder of it"
        )


def _warn_of_others(place: Place, files: list[_Entry]) -> Iterator[str]:
    others = [e.relative for e in files if not e.relative.lower().endswith(IMAGE_SUFFIXES)]
    if others:
        listed = first_few(sorted(others), 3)
        yield f"{place.spec}: {len(others)} files are not images by name, left out: {listed}"


def _warn_of_empty_folders(place: Place, entries: list[_Entry]) -> Iterator[str]:
    useful = (e for e in entries if e.size < 0 or e.relative.lower().endswith(IMAGE_SUFFIXES))
    filled = {entry.relative.rpartition("/")[0] for entry in useful}
    empty = sorted(e.relative for e in entries if e.size < 0 and e.relative not in filled)
    if empty:
        listed = first_few(empty)
        yield f"{place.spec}: {len(empty)} folders hold no image and give no class: {listed}"


def _warn_of_merged_classes(place: Place, chosen: list[_Entry]) -> Iterator[str]:
    """Tell of classes in several folders: the root of train/ and val/ would train on both."""
    folders: dict[str, set[str]] = defaultdict(set)
    for entry in chosen:
        folder = entry.relative.rpartition("/")[0]
        folders[folder.rpartition("/")[2]].add(folder)
    merged = [" + ".join(sorted(found)) for _, found in sorted(folders.items()) if len(found) > 1]
    if merged:
        yield (
            f"{place.spec}: {len(merged)} classes are merged from several folders: "
            f"{first_few(merged, 3)}; if these are splits, name one of them"
        )
