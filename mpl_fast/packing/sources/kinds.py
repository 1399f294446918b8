"""Opens sources: the table of their kinds."""

from collections.abc import Callable
from pathlib import Path

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.sources.cifar import CifarSource
from mpl_fast.packing.sources.folder import FolderSource
from mpl_fast.packing.sources.labels import Labels
from mpl_fast.packing.sources.lists import ListSource
from mpl_fast.packing.sources.mnist import MnistSource
from mpl_fast.packing.sources.parquet import ParquetSource
from mpl_fast.packing.sources.patterns import matching_files
from mpl_fast.packing.sources.record_files import RecordSource
from mpl_fast.packing.sources.source import Request, Source
from mpl_fast.packing.sources.stl10 import Stl10Source
from mpl_fast.packing.sources.svhn import SvhnSource
from mpl_fast.packing.sources.tar import TarSource
from mpl_fast.packing.sources.webdataset import ShardsSource, WebDatasetSource
from mpl_fast.packing.sources.zip import ZipSource

# The first that recognizes a path opens it; the last recognizes every file.
KINDS: tuple[type[Source], ...] = (
    ParquetSource,
    FolderSource,
    ListSource,
    RecordSource,
    SvhnSource,
    MnistSource,
    Stl10Source,
    ZipSource,
    CifarSource,
    WebDatasetSource,
    TarSource,
)
# Of kinds that can be the files of a pattern: what reads them as one source.
SEVERAL: dict[type[Source], type[Source]] = {
    ParquetSource: ParquetSource,
    WebDatasetSource: ShardsSource,
}
# Of kinds whose byte ranges are not the images themselves: `decode`, and what it is given besides.
DECODERS = {
    kind.kind: (kind.decode, kind.behind) for kind in KINDS if kind.decode is not Source.decode
}


def open_source(
    spec: str,
    root: Path | None,
    work: Path,
    report: Callable[[str], None],
    class_from: str | None = None,
    *,
    labels: Labels | None = None,
    unlabeled: bool = False,
    partial: bool = False,
) -> Source:
    """Open DIR, FILE or FILE:FOLDER; the options are those of `Request`.

    Raises DataError when spec cannot be read.
    """
    path, folder, files = find_path(spec)
    kind = _kind_of(path)
    if labels is not None and kind.has_labels:
        raise ConfigError(f"{spec} has its own labels: leave out the labels file {labels.path}")
    if files:
        several = SEVERAL | ({TarSource: ShardsSource} if unlabeled or labels else {})
        for file in files:
            if several.get(_kind_of(file)) is not several.get(kind, Source):
                kinds = "parquet files or webdataset shards"
                raise DataError(f"{spec}: names {file}, but a pattern must name {kinds} only")
        kind = several[kind]
    how = (root, labels, work, report, unlabeled, files, partial, class_from)
    return kind(Request(spec, path, folder, *how))


def _kind_of(path: Path) -> type[Source]:
    try:
        return next(kind for kind in KINDS if kind.recognizes(path))
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror}") from error


def find_path(spec: str) -> tuple[Path, str, tuple[Path, ...]]:
    """Return the path in spec, the folder inside that archive, "" for all of it, and its files.

    Files are there if spec is a pattern; the path is the first of them. Raises DataError if
    there is none.
    """
    path = Path(spec)
    before, colon, folder = spec.rpartition(":")
    try:
        if path.is_dir() or path.is_file():
            return path, "", ()
        if path.exists():
            raise DataError(f"{spec}: neither a file nor a folder")
        if colon and (Path(before) / "manifest.json").is_file():
            raise DataError(f"{spec}: {before} holds packed records; name one of its .rec files")
        if colon and Path(before).is_file():
            if not _kind_of(Path(before)).has_folders:
                raise DataError(f"{spec}: only an archive has folders; write {before}")
            return Path(before), folder, ()
        if colon and Path(before).is_dir():
            if _kind_of(Path(before)).has_folders:
                return Path(before), folder, ()
            raise DataError(f"{spec}: {before} is a folder; write {before}/{folder}")
        for pattern, part in ((spec, ""), (before, folder)):
            if files := matching_files(pattern):
                return files[0], part, files
    except OSError as error:
        raise DataError(f"{spec}: {error.strerror}") from error
    raise DataError(f"{spec}: no such folder or file")
