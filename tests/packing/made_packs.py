"""Plans and packs made step by step in the test's own process: from images that need not exist,
or from a tree of real files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mpl_fast.packing.options import ImageOptions, Json, PackOptions, SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.plan.prepare import plan_to
from mpl_fast.packing.plan.table import (
    TABLE,
    RecordRow,
    ShardRow,
    Table,
    WrittenRow,
    image_key,
    open_table,
)
from mpl_fast.packing.publish.finish import finish
from mpl_fast.packing.publish.out_folder import WORK
from mpl_fast.packing.sources.source import Image, Source
from mpl_fast.packing.write.workers import run_job

ROOT = Path(__file__).resolve().parents[2]
KEEP = ImageOptions(check="none")


def image(class_name: str, name: str, size: int = 10) -> Image:
    return Image(class_name, name, f"{class_name}/{name}", -1, size, 7)


def images_of(counts: Mapping[str, int], size: int = 10) -> list[Image]:
    """Return images `0.jpg`, `1.jpg`, ... of each class."""
    return [
        image(name, f"{number}.jpg", size)
        for name, count in counts.items()
        for number in range(count)
    ]


def source_of(
    images: Iterable[Image],
    *,
    spec: str = "somewhere",
    order: Sequence[str] | None = None,
    stamp: int = 0,
) -> Source:
    """Return a source of images; order are the classes of a source that numbers its labels."""

    def listed(source: Source) -> Iterable[Image]:
        source.class_order = None if order is None else tuple(order)
        return images

    kind = "archive" if stamp else "folder"
    return Source(spec, kind, Path("/", spec), 0, stamp, listed)  # type: ignore[arg-type]


class Planned:
    """What a table says when it is read once more, all of it."""

    def __init__(self, path: Path) -> None:
        with open_table(path) as table:
            self.shards: list[ShardRow] = table.shards()
            self.rows: list[RecordRow] = [row for s in self.shards for row in table.records(s)]
            self.classes = table.classes()
            self.keys = [image_key(self.classes, row) for row in self.rows]

    def of(self, prefix: str) -> list[RecordRow]:
        """Return the records of the files of a prefix."""
        ids = {
            number
            for shard in self.shards
            if shard.prefix == prefix
            for number in range(shard.first_id, shard.first_id + shard.records)
        }
        return [row for row in self.rows if row.id in ids]

    def labels(self) -> dict[str, int]:
        return {name: row.label for name, row in zip(self.keys, self.rows, strict=True)}


def plan_of(
    path: Path,
    train: Source | Sequence[Source],
    how: SplitOptions,
    val: Source | None = None,
    image_options: ImageOptions = KEEP,
) -> Planned:
    """Plan with the options that finishing asks for, and return the plan."""
    sources = [train] if isinstance(train, Source) else train
    options = PackOptions(
        src=tuple(source.spec for source in sources),
        out=path.parent,
        split=how,
        image=image_options,
    )
    make_plan(path, sources, val, how, image_options, options.planned())
    return Planned(path)


def options_of(src: Path, out: Path, how: SplitOptions, val: Path | None = None) -> PackOptions:
    """Return what it takes to pack files as they are."""
    options = PackOptions(src=(str(src),), out=out, split=how, image=KEEP, quiet=True)
    return replace(options, val=str(val) if val else None)


def plan_work(options: PackOptions) -> Path:
    """Make the work folder of options with its plan, and return it."""
    work = options.out / WORK
    work.mkdir(parents=True, exist_ok=True)
    plan_to(work / TABLE, options)
    return work


def write_shards(work: Path, image_options: ImageOptions = KEEP) -> Path:
    """Write every shard of the plan in work."""
    with open_table(work / TABLE) as table:
        shards = table.shards()
    for shard in shards:
        run_job(work, shard.number, image_options, 0, lambda images, size: None)
    return work


def finished(options: PackOptions) -> tuple[Path, Json]:
    """Return the work folder of a pack that only lacks its manifest, and the manifest."""
    work = write_shards(plan_work(options), options.image)
    return work, finish(work, options.image)


def written_rows(table: Table, shard: ShardRow) -> list[tuple[RecordRow, WrittenRow]]:
    """Return the records that a shard holds, in order, with their places in it."""
    query = (
        "SELECT records.*, written.* FROM written JOIN records USING (id) "
        "WHERE id BETWEEN ? AND ? ORDER BY id"
    )
    width = len(RecordRow._fields)
    # USING gives one id column for `records.*` and again for `written.*`.
    return [
        (RecordRow(*row[:width]), WrittenRow(*row[width:]))
        for row in table.query(query, (shard.first_id, shard.first_id + shard.records - 1))
    ]
