"""The records of a sweep: those of a pack, with a part of its labeled images to validate with.

Nothing is copied: the .rec files are links, and the splits are index files over them.
"""

import hashlib
import itertools
import shutil
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpl_fast.atomic import sync_folder, write_bytes, write_json, write_text
from mpl_fast.data.manifest import CLASSES, MANIFEST, load_manifest, read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.errors import DataError
from mpl_fast.packing.plan.choose_labeled import choose_val, images_in_memory
from mpl_fast.packing.plan.table import TABLE, open_table
from mpl_fast.packing.publish.sparse_index import check_index, padded_lines
from mpl_fast.packing.publish.split_files import class_counts

Json = dict[str, Any]


def hold_out(rec: Path, out: Path, how: str, seed: int) -> None:
    """Writes a folder of records whose validation images are a share of `rec`'s labeled ones.

    `how` is a share ("20%") or a number, divided among the classes by their sizes and drawn by
    `seed`; every class keeps an image for training. The images are in neither training split of
    `out`, also where `rec` lists its labeled images as unlabeled ones, too, or has copies of them
    under other names: their labels would not leak, but the networks would have learned from the
    very images. Raises `ConfigError` if the share leaves too few.
    """
    manifest, stored = read_manifest(rec), load_manifest(rec)
    labeled, unlabeled = (SplitImages(manifest.splits[name]) for name in ("labeled", "unlabeled"))
    rows = zip(labeled.ids, labeled.labels, labeled.names, strict=True)
    with images_in_memory(rows, manifest.classes) as images:
        ids = set(choose_val(images, how, seed=seed, option="--held-out"))
    held = {name for number, name in zip(labeled.ids, labeled.names, strict=True) if number in ids}
    if stored["duplicates"]["groups"]:
        held |= _copies(rec / TABLE, ids, (labeled, unlabeled))
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_bytes(unfinished / CLASSES, (rec / CLASSES).read_bytes())
    splits = stored["splits"]
    stored["splits"] = {
        name: _write_split(unfinished, name, stored, source["shards"], images, places)
        for name, source, images, places in (
            ("labeled", splits["labeled"], labeled, _others(labeled, held)),
            ("unlabeled", splits["unlabeled"], unlabeled, _others(unlabeled, held)),
            ("val", splits["labeled"], labeled, [p for p, n in enumerate(labeled.ids) if n in ids]),
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


def _copies(table: Path, ids: set[int], splits: Sequence[SplitImages]) -> set[str]:
    """Names of the images of `splits` that equal one of `ids`."""
    with open_table(table) as rows:
        written = "SELECT id, size, crc32 FROM written"
        keys = {tuple(key) for number, *key in rows.query(written) if number in ids}
        alike = {number for number, *key in rows.query(written) if tuple(key) in keys}
    found = [
        (number, name, hashlib.sha256(images.image(place)).digest())
        for images in splits
        for place, (number, name) in enumerate(zip(images.ids, images.names, strict=True))
        if number in alike
    ]
    contents = {digest for number, _, digest in found if number in ids}
    return {name for _, name, digest in found if digest in contents}


def _others(images: SplitImages, held: set[str]) -> list[int]:
    """The places of the images that are not held out."""
    return [place for place, name in enumerate(images.names) if name not in held]


def _write_split(
    out: Path,
    name: str,
    stored: Json,
    shards: Sequence[str],
    images: SplitImages,
    places: Sequence[int],
) -> Json:
    """Writes the index and the listing of some images of a split; returns the manifest's entry."""
    if not places:
        raise DataError(f"without the held-out images, no {name} image is left")
    bytes_of = {shard["file"]: shard["bytes"] for shard in stored["shards"]}
    sizes = [bytes_of[file] for file in shards]
    ends = list(itertools.accumulate(sizes))
    entries = (
        (images.ids[at], bisect(ends, images.offsets[at]), images.offsets[at]) for at in places
    )
    index, listing = f"{name}.idx", f"{name}.lst"
    lines = list(padded_lines(entries))
    check_index(lines, sizes, index)
    rows = (f"{images.ids[at]}\t{images.labels[at]}\t{images.names[at]}\n" for at in places)
    return {
        "records": len(places),
        "shards": shards,
        "idx": index,
        "idx_sha256": write_text(out / index, "".join(lines)),
        "lst": listing,
        "lst_sha256": write_text(out / listing, "".join(rows)),
        **class_counts(Counter(images.labels[at] for at in places), stored["classes"]["n"]),
    }
