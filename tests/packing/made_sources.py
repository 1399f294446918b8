"""Opened sources and their images; sources of images that need not exist, and their plans."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.packing.options import ImageOptions, PackOptions, SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.sources.kinds import open_source
from mpl_fast.packing.sources.labels_file import read_labels
from mpl_fast.packing.sources.source import IN_SHARD, SHARDS, Image, Request, Source
from tests.packing.packs import KEEP, Planned, jpeg, make_records, make_tar, make_tree


def opened(
    spec: Path | str,
    work: Path,
    *,
    root: Path | None = None,
    labels: Path | None = None,
    report: Callable[[str], None] = print,
    unlabeled: bool = False,
    class_from: str | None = None,
) -> Source:
    """Open what spec names; compressed archives are unpacked into work."""
    given = read_labels(labels, report) if labels else None
    how: dict[str, Any] = {"root": root, "work": work, "labels": given, "report": report}
    return open_source(str(spec), **how, unlabeled=unlabeled, class_from=class_from)


def listed(
    spec: Path | str,
    work: Path,
    *,
    root: Path | None = None,
    labels: Path | None = None,
    class_from: str | None = None,
) -> tuple[Source, list[Image]]:
    """Return what spec names and all of its images, sorted."""
    source = opened(spec, work, root=root, labels=labels, class_from=class_from)
    images = sorted(source.images())
    if source.request.labels:
        source.request.labels.require_fit()
    return source, images


def keys(images: Sequence[Image]) -> list[str]:
    """Return `class/name` of each image."""
    return [f"{image.class_name}/{image.name}" for image in images]


def content(source: Source, image: Image) -> bytes:
    """Return the bytes in the range of an image."""
    if image.start < 0:
        path = source.file / image.path
        assert path.stat().st_mtime_ns == image.stamp
        assert path.stat().st_size == image.size
        return path.read_bytes()
    path, stamp = source.file, 0
    if source.kind == SHARDS:
        path /= image.path.partition(IN_SHARD)[0]
        stamp = path.stat().st_mtime_ns
    assert image.stamp == stamp
    with path.open("rb") as file:
        return os.pread(file.fileno(), image.size + source.behind, image.start)


def entries(spec: Path | str, work: Path, *, labels: Path | None = None) -> list[tuple[str, bytes]]:
    """Return `class/name` and content of every image, sorted."""
    source, images = listed(spec, work, labels=labels)
    return [(key, content(source, image)) for key, image in zip(keys(images), images, strict=True)]


def image(class_name: str, name: str, size: int = 10) -> Image:
    return Image(class_name, name, f"{class_name}/{name}", -1, size, 7)


def images_of(counts: Mapping[str, int], size: int = 10) -> list[Image]:
    """Return images `0.jpg`, `1.jpg`, ... of each class."""
    return [
        image(name, f"{number}.jpg", size)
        for name, count in counts.items()
        for number in range(count)
    ]


def numbered_source(folder: Path, kind: str, labels: tuple[int, ...]) -> str:
    """Write two images of each label as a source that numbers its classes; return its spec."""
    rows = [(label, at, jpeg(at)) for at, label in enumerate([*labels, *labels])]
    path = folder / f"a.{kind}"
    if kind == "rec":
        make_records(path, rows)
    elif kind == "lst":
        make_tree(folder, {f"{at}.jpg": image for _, at, image in rows})
        path.write_text("".join(f"{at}\t{label}\t{at}.jpg\n" for label, at, _ in rows))
    elif kind == "tar":
        files = ((f"{at}.{end}", one) for label, at, image in rows
                 for end, one in (("cls", b"%d" % label), ("jpg", image)))  # fmt: skip
        make_tar(path, files)
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image": [image for *_, image in rows], "label": [row[0] for row in rows]}
        pq.write_table(pa.table(columns), path)
    return str(path)


class MadeSource(Source):
    """A source of images that need not exist; order are the classes if it numbers its labels."""

    kind = "archive"

    def __init__(
        self,
        images: Sequence[Image],
        spec: str = "somewhere",
        *,
        order: Sequence[str] | None = None,
        stamp: int = 0,
        warnings: Sequence[str] = (),
    ) -> None:
        self.request = Request(spec, Path("/", spec), "", None, None, Path(), print)
        self.spec, self.file, self.size, self.stamp = spec, self.request.path, 0, stamp
        self.class_order = None if order is None else tuple(order)
        self.warnings = ["of an earlier listing"]
        self._listed, self._new_warnings = images, warnings

    def _list(self) -> Iterator[Image]:
        yield from self._listed
        self.warnings += self._new_warnings


def plan_of(
    path: Path,
    train: Source | Sequence[Source],
    how: SplitOptions,
    val: Source | None = None,
    image_options: ImageOptions = KEEP,
) -> Planned:
    """Plan and return the plan."""
    sources = [train] if isinstance(train, Source) else train
    src = tuple(source.spec for source in sources)
    options = PackOptions(src=src, out=path.parent, split=how, image=image_options)
    make_plan(path, sources, val, options, warn=lambda lines: None)
    return Planned(path)
