"""The records of a sweep: those of a pack, with a part of its labeled images to validate with.

Nothing is copied: the .rec files are links, and the splits are index files over them.
"""

import itertools
import shutil
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.atomic import atomic_file, sync_folder, write_bytes, write_json
from mpl_fast.data.manifest import CLASSES, MANIFEST, load_manifest, read_manifest
from mpl_fast.errors import DataError
from mpl_fast.packing.plan.choose_labeled import choose_val
from mpl_fast.packing.publish.sparse_index import check_index, padded_lines
from mpl_fast.packing.publish.split_files import class_counts

Json = dict[str, Any]


class Listed(NamedTuple):
    """A record of a split."""

    id: int
    label: int
    name: bytes  # class/name, or the path of an image without a label
    offset: int  # over the joined .rec files of the split


def hold_out(rec: Path, out: Path, how: str, seed: int) -> None:
    """Writes a folder of records whose validation images are a share of `rec`'s labeled ones.

    `how` is a share ("20%") or a number, divided among the classes by their sizes and drawn by
    `seed`; every class keeps an image for training. The images are in neither training split of
    `out`, also where `rec` lists its labeled images as unlabeled ones, too: their labels would not
    leak, but the networks would have learned from the very images. Raises `ConfigError` if the
    share leaves too few.
    """
    manifest, stored = read_manifest(rec), load_manifest(rec)
    labeled = list(_listed(rec, stored["splits"]["labeled"]))
    images = ((one.id, manifest.classes[one.label], _text(one.name)) for one in labeled)
    ids = choose_val(images, how, seed=seed, option="--held-out")
    held = {one.name for one in labeled if one.id in ids}
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_bytes(unfinished / CLASSES, (rec / CLASSES).read_bytes())
    stored["splits"] = {
        name: _write_split(rec, unfinished, stored, source, name, keep)
        for name, source, keep in (
            ("labeled", "labeled", lambda one: one.name not in held),
            ("unlabeled", "unlabeled", lambda one: one.name not in held),
            ("val", "labeled", lambda one: one.name in held),
        )
    }
    used = {file for split in stored["splits"].values() for file in split["shards"]}
    stored["shards"] = [shard for shard in stored["shards"] if shard["file"] in used]
    for file in used:
        (unfinished / file).symlink_to((rec / file).resolve())
    stored["held_out"] = {"from": str(rec.resolve()), "share": how, "seed": seed}
    write_json(unfinished / MANIFEST, stored)
    unfinished.replace(out)
    sync_folder(out.parent)


def _listed(root: Path, split: Json) -> Iterator[Listed]:
    """The records of a split, in the order of its files."""
    with (root / split["idx"]).open("rb") as index, (root / split["lst"]).open("rb") as listing:
        lines = (line for line, _ in itertools.groupby(index))  # repeated ones are padding
        for place, text in zip(lines, listing, strict=True):
            record, offset = place.split(b"\t")
            number, label, name = text.rstrip(b"\n").split(b"\t", 2)
            if number != record:
                raise DataError(f"{root / split['lst']}: does not fit {split['idx']}; pack again")
            yield Listed(int(number), int(label), name, int(offset))


def _write_split(
    rec: Path, out: Path, stored: Json, source: str, name: str, keep: Callable[[Listed], bool]
) -> Json:
    """Writes the index and the listing of those records of `rec`'s split `source` that are kept;
    returns the manifest's entry."""
    split = stored["splits"][source]
    bytes_of = {shard["file"]: shard["bytes"] for shard in stored["shards"]}
    sizes = [bytes_of[file] for file in split["shards"]]
    ends = list(itertools.accumulate(sizes))
    counts: Counter[int] = Counter()
    with atomic_file(out / f"{name}.idx") as idx, atomic_file(out / f"{name}.lst") as lst:

        def entries() -> Iterator[tuple[int, int, int]]:
            for one in _listed(rec, split):
                if keep(one):
                    counts[one.label] += 1
                    lst.write(b"%d\t%d\t%b\n" % (one.id, one.label, one.name))
                    yield one.id, bisect(ends, one.offset), one.offset

        for line in padded_lines(entries()):
            idx.write(line.encode())
    if not counts:
        raise DataError(f"{rec}: without the held-out images, no {name} image is left")
    with (out / f"{name}.idx").open(encoding="ascii") as lines:
        check_index(lines, sizes, f"{name}.idx")
    return {
        "records": counts.total(),
        "shards": split["shards"],
        "idx": f"{name}.idx",
        "idx_sha256": idx.sha256,
        "lst": f"{name}.lst",
        "lst_sha256": lst.sha256,
        **class_counts(counts, stored["classes"]["n"]),
    }


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
