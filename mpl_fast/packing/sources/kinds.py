"""Opens sources: the table of their kinds."""

from collections.abc import Callable
from pathlib import Path

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.sources.folder import FolderSource
from mpl_fast.packing.sources.lists import ListSource
from mpl_fast.packing.sources.record_files import RecordSource
from mpl_fast.packing.sources.source import Request, Source
from mpl_fast.packing.sources.tar import TarSource

# The first that recognizes a path opens it; the last recognizes every file.
KINDS: tuple[type[Source], ...] = (FolderSource, ListSource, RecordSource, TarSource)
# Of kinds whose byte ranges are not the images themselves.
DECODERS = {kind.kind: kind.decode for kind in KINDS if kind.decode is not Source.decode}


def open_source(
    spec: str,
    *,
    root: Path | None,
    labels: Path | None,
    work: Path,
    report: Callable[[str], None],
    unlabeled: bool = False,
) -> Source:
    """Open DIR, FILE or FILE:FOLDER; the options are those of `Request`.

    Raises DataError when spec cannot be read.
    """
    path, folder = find_path(spec)
    kind = _kind_of(path)
    if labels is not None and kind.has_labels:
        raise ConfigError(f"{spec} has its own labels: leave out the labels file {labels}")
    return kind(Request(spec, path, folder, root, labels, work, report, unlabeled))


def _kind_of(path: Path) -> type[Source]:
    return next(kind for kind in KINDS if kind.recognizes(path))


def find_path(spec: str) -> tuple[Path, str]:
    """Return the path in spec, and the folder inside that archive, "" for all of it.

    Raises DataError when there is no such file or folder.
    """
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
            if not _kind_of(Path(before)).has_folders:
                raise DataError(f"{spec}: only an archive has folders; write {before}")
            return Path(before), folder
    except OSError as error:
        raise DataError(f"{spec}: {error.strerror}") from error
    raise DataError(f"{spec}: no such folder or file")
