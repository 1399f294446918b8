"""Opens sources of images (folder, tar archive, .rec, .lst) and lists them as byte ranges."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import Tally, first_few
from mpl_fast.packing.sources.archives import Spools, clean_name, members
from mpl_fast.packing.sources.labels_file import Labels
from mpl_fast.packing.sources.lists import class_names, listed_files
from mpl_fast.packing.sources.record_files import RecordSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Image(NamedTuple):
    """One image: its class, its file name, and the byte range of its content."""

    class_name: str
    name: str  # without folders
    path: str  # inside its source, with "/"
    start: int  # byte offset in the source's file; -1: it is a file of its own
    size: int  # bytes; of a source of records: of the whole framed record
    stamp: int  # modification time in ns of a file of its own, else 0


@dataclass
class Source:
    """An opened --src or --val: the folder or file to read, and how its images are listed."""

    spec: str  # as the user wrote it
    kind: str  # "folder", "archive" or "records", as in table.SourceRow
    file: Path  # the folder, or the file that contains all images
    size: int  # bytes of that file; 0 for a folder
    stamp: int  # its modification time in ns; 0 for a folder
    _list: Callable[["Source"], Iterator[Image]]
    warnings: list[str] = field(default_factory=list)  # complete at the end of images()
    # At the end of images(): class names by label if the source numbers its labels, else None.
    class_order: tuple[str, ...] | None = None

    def images(self) -> Iterator[Image]:
        """Yield all images in any order; DataError if there are none or one cannot be packed.

        Memory does not grow with their number, except for 8 bytes per line of a .lst and the
        content of a labels file.
        """
        self.warnings.clear()
        empty = True
        for image in self._list(self):
            empty = False
            # These would break the lines of a .lst.
            key = f"{image.class_name}/{image.name}"
            if "\t" in key or "\n" in key or "\r" in key:
                fault = "has a tab or line break in its name"
                raise DataError(f"{self.spec}: {image.path!r} {fault}")
            yield image
        if empty:
            raise DataError("; ".join((self._nothing(), *self.warnings)))

    def _nothing(self) -> str:
        if (self.file / "manifest.json").is_file():
            return f"{self.spec}: no image found; of packed records, name the .rec files"
        return f"{self.spec}: no image found (looked for {', '.join(IMAGE_SUFFIXES)})"


class _Entry(NamedTuple):
    relative: str  # with "/" between its parts
    start: int
    size: int  # bytes; -1 for a folder
    stamp: int


class _Folder(NamedTuple):
    prefix: str  # of the names in it, relative to the source
    path: str
    chain: tuple[tuple[int, int], ...]  # (device, inode) of the folders from the source to here


def open_source(spec: str, *, root: Path | None, labels: Path | None, spools: Spools) -> Source:
    """Open DIR, ARCHIVE, ARCHIVE:FOLDER, FILE.rec or FILE.lst.

    The paths of a .lst are relative to root, by default its own folder. The labels file gives the
    classes of images outside class folders. Raises DataError when spec cannot be read.
    """
    path, folder = _find(spec)
    is_list = path.suffix == ".lst"
    if labels is not None and (is_list or path.suffix == ".rec"):
        raise ConfigError(f"{spec} has its own labels: leave out the labels file {labels}")
    if path.is_dir():
        return Source(spec, "folder", path, 0, 0, lambda source: _tree(source, labels))
    if is_list:
        base = path.parent if root is None else root
        if not base.is_dir():
            raise DataError(f"{base}: no such folder; the images listed in {path} must be below it")
        return Source(spec, "folder", base, 0, 0, lambda source: _listed(source, path))
    if path.suffix == ".rec":
        return _of_file(spec, "records", path, _recorded)
    file = spools.get(path)
    return _of_file(spec, "archive", file, lambda source: _tar(source, path, folder, labels))


def _of_file(
    spec: str, kind: str, file: Path, listing: Callable[[Source], Iterator[Image]]
) -> Source:
    state = file.stat()
    return Source(spec, kind, file, state.st_size, state.st_mtime_ns, listing)


def _find(spec: str) -> tuple[Path, str]:
    """Return the path in spec, and the folder inside that archive, "" for all of it."""
    path = Path(spec)
    before, colon, folder = spec.rpartition(":")
    try:
        if path.is_dir() or path.is_file():
            return path, ""
        if path.exists():
            raise DataError(f"{spec}: neither a file nor a folder")
        if colon and (Path(before) / "manifest.json").is_file():
            raise DataError(f"{spec}: {before} holds packed records; name one of its .rec files")
        if colon and Path(before).is_dir():
            raise DataError(f"{spec}: {before} is a folder; write {before}/{folder}")
        if colon and Path(before).is_file():
            if before.endswith((".rec", ".lst")):
                raise DataError(f"{spec}: only an archive has folders; write {before}")
            return Path(before), clean_name(folder)
    except OSError as error:
        raise DataError(f"{spec}: {error.strerror}") from error
    raise DataError(f"{spec}: no such folder or file")


def _tree(source: Source, labels: Path | None) -> Iterator[Image]:
    yield from _chosen(source, _folder_entries(source.file), labels)


def _tar(source: Source, archive: Path, folder: str, labels: Path | None) -> Iterator[Image]:
    listed = members(source.file, archive, folder)
    visible = (member for member in listed if "/." not in f"/{member.name}")
    yield from _chosen(source, (_Entry(*member, 0) for member in visible), labels)


def _listed(source: Source, list_path: Path) -> Iterator[Image]:
    names = source.class_order = class_names(list_path)
    used = set()
    for label, path, size, stamp in listed_files(list_path, source.file):
        used.add(label)
        yield Image(names[label], path.rpartition("/")[2], path, -1, size, stamp)
    if unused := [str(label) for label in range(len(names)) if label not in used]:
        text = f"{len(unused)} of the labels 0 to {len(names) - 1} have no image"
        source.warnings.append(f"{source.spec}: {text}: {first_few(unused)}")


def _recorded(source: Source) -> Iterator[Image]:
    records = RecordSource(source.file)
    for class_name, path, start, size in records.records():
        yield Image(class_name, path.rpartition("/")[2], path, start, size, 0)
    source.class_order = records.class_order


def _folder_entries(root: Path) -> Iterator[_Entry]:
    """Yield all files and folders below root; links are followed, a loop of links is an error."""
    pending = [_Folder("", str(root), (_identity(root.stat()),))]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder.path) as items:
                for item in items:
                    if item.name.startswith("."):
                        continue
                    relative = folder.prefix + item.name
                    state = item.stat()
                    if item.is_file():
                        yield _Entry(relative, -1, state.st_size, state.st_mtime_ns)
                        continue
                    if not item.is_dir():
                        raise DataError(f"{item.path}: neither a file nor a folder")
                    if _identity(state) in folder.chain:
                        raise DataError(f"{item.path}: this link leads back to a folder above it")
                    chain = (*folder.chain, _identity(state))
                    pending.append(_Folder(f"{relative}/", item.path, chain))
                    yield _Entry(relative, -1, -1, 0)
        except OSError as error:
            raise DataError(f"{error.filename or folder.path}: {error.strerror}") from error


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _chosen(source: Source, entries: Iterator[_Entry], labels: Path | None) -> Iterator[Image]:
    """Yield the entries named as images, with the class of their folder or the labels file."""
    leftovers = _Leftovers()
    images = _in_classes(source.spec, entries, leftovers, labels is None)
    yield from images if labels is None else _labeled(source.spec, images, Labels(labels))
    source.warnings.extend(
        f"{source.spec}: {text}" for text in leftovers.warnings(merging=labels is None)
    )


def _in_classes(
    spec: str, entries: Iterator[_Entry], leftovers: "_Leftovers", need_folder: bool
) -> Iterator[Image]:
    previous = class_name = ""
    for entry in entries:
        relative, start, size, stamp = entry
        if size < 0:
            leftovers.folders.add(relative)
            continue
        if not relative.lower().endswith(IMAGE_SUFFIXES):
            leftovers.others.add(relative)
            continue
        folder, _, name = relative.rpartition("/")
        if folder != previous:
            previous, class_name = folder, folder.rpartition("/")[2]
            leftovers.classes[class_name].add(folder)
        if need_folder and not folder:
            hint = "give the classes with a labels file, or name the folder above"
            raise DataError(f"{spec}: {relative} is outside any class folder; {hint}")
        yield Image(class_name, name, relative, start, size, stamp)


def _labeled(spec: str, images: Iterator[Image], labels: Labels) -> Iterator[Image]:
    """Yield the images with their classes from the labels file."""
    if labels.in_order:
        images = iter(sorted(images, key=lambda image: image.name))
    for image in images:
        class_name = labels.take(image.name)
        if class_name is not None:
            yield image._replace(class_name=class_name)
    labels.require_all_taken(spec)


class _Leftovers:
    """Files and folders of a source that are no images, and the folders of each class."""

    def __init__(self) -> None:
        self.others = Tally(3)
        self.folders: set[str] = set()
        self.classes: dict[str, set[str]] = defaultdict(set)

    def warnings(self, *, merging: bool) -> Iterator[str]:
        """Yield warnings, one line each; `merging`: images get the class of their folder."""
        if self.others.count:
            yield f"{self.others.count} files are not images by name, left out: {self.others}"
        filled = set().union(*self.classes.values())
        filled.update(folder.rpartition("/")[0] for folder in self.folders)
        empty = sorted(self.folders - filled)
        if empty:
            yield f"{len(empty)} folders hold no image and give no class: {first_few(empty)}"
        # With --src the parent of train/ and val/, training would use both.
        several = [name for name, where in sorted(self.classes.items()) if len(where) > 1]
        if several and merging:
            merged = [" + ".join(sorted(self.classes[name])) for name in several]
            yield (
                f"{len(merged)} classes are merged from several folders: "
                f"{first_few(merged, 3)}; if these are splits, name one of them"
            )
