"""Small trees, archives, lists and records for the tests of what can be packed."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from mpl_fast.data.records import image_record
from mpl_fast.packing.sources.archives import Spools
from mpl_fast.packing.sources.source import Image, Source, open_source


def make_tree(root: Path, contents: Mapping[str, bytes]) -> Path:
    """Write files below root, which is returned."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def make_tar(
    path: Path,
    contents: Iterable[tuple[str, bytes]],
    mode: str = "w",
    form: int = tarfile.PAX_FORMAT,
) -> Path:
    """Write a tar archive, which is returned; a name that ends in "/" is a folder's."""
    with tarfile.open(path, mode, format=form, errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for name, content in contents:
            item = tarfile.TarInfo(name.rstrip("/"))
            item.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def make_records(path: Path, rows: Iterable[tuple[float, int, bytes]]) -> Path:
    """Write records of (label, id, image), and return their file."""
    path.write_bytes(b"".join(image_record(label, number, image) for label, number, image in rows))
    return path


def listed(
    spec: Path | str, spools: Path, *, root: Path | None = None, labels: Path | None = None
) -> tuple[Source, list[Image]]:
    """Return what spec names and all of its images, sorted."""
    work = Spools(spools, lambda line: None)
    source = open_source(str(spec), root=root, labels=labels, spools=work)
    return source, sorted(source.images())


def keys(images: Iterable[Image]) -> list[str]:
    """Return `class/name` of each image."""
    return [f"{image.class_name}/{image.name}" for image in images]


def content(source: Source, image: Image) -> bytes:
    """Return the bytes that an image says it has."""
    if image.start < 0:
        path = source.file / image.path
        assert path.stat().st_mtime_ns == image.stamp
        assert path.stat().st_size == image.size
        return path.read_bytes()
    assert image.stamp == 0
    return source.file.read_bytes()[image.start :][: image.size]
