"""A finished folder of records, made without the packer: the format as it is described, by hand."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import CLASSES as CLASSES_FILE
from mpl_fast.data.manifest import FORMAT, MANIFEST
from mpl_fast.data.records import image_record, is_multipart
from mpl_fast.packing.plan.table import TABLE, create_table, create_written, to_utf8
from mpl_fast.packing.publish.sparse_index import padded_lines
from tests.packing.packs import CLASSES, jpeg, with_magic

SPLITS = {"train_label": "labeled", "train_unlabel": "unlabeled", "val": "val"}


@dataclass(frozen=True)
class Record:
    """One record as it was put in."""

    id: int
    label: int
    name: str
    image: bytes
    file: str
    offset: int  # in that file
    start: int  # of that file in the joined files of its prefix

    @property
    def key(self) -> str:
        return f"{CLASSES[self.label]}/{self.name}"


@dataclass(frozen=True)
class SmallPack:
    """A folder of records, and what was put into it."""

    root: Path
    records: Mapping[int, Record]

    def of(self, file: str) -> list[Record]:
        return [record for record in self.records.values() if record.file == file]


def make_pack(
    root: Path,
    *,
    shards: Mapping[str, Sequence[int]],
    labeled: Collection[int] = (),
    skipped: Collection[int] = (),
    images: Mapping[int, bytes] | None = None,
    layout: str = "shared",
) -> SmallPack:
    """Write a finished folder: shards says how many planned records each file of a prefix has.

    The record with id 1 has several parts. images replaces the content of records; the ids in
    skipped are planned, but not written.
    """
    root.mkdir(parents=True)
    table = create_table(root / TABLE)
    table.execute("INSERT INTO plan VALUES (?)", (json.dumps({"layout": layout}),))
    table.executemany("INSERT INTO classes VALUES (?, ?)", enumerate(CLASSES))
    source = root.parent / f"{root.name}-source"
    table.execute("INSERT INTO sources VALUES (0, ?, 'folder', ?, 0, 0)", (str(source),) * 2)
    create_written(table)
    records: dict[int, Record] = {}
    entries: list[dict[str, Any]] = []
    number = 0
    for prefix, counts in shards.items():
        start = 0
        for at, count in enumerate(counts):
            single = len(counts) == 1
            file = f"{prefix}.rec" if single else f"{prefix}-{at:05}-of-{len(counts):05}.rec"
            first = number
            content = b""
            multipart = 0
            for record_id in range(first, first + count):
                label, name = record_id % len(CLASSES), f"{prefix}_{record_id}.jpg"
                image = (images or {}).get(record_id) or jpeg(record_id)
                if record_id == 1 and not images:
                    image = with_magic(image)
                place = f"{CLASSES[label]}/{name}"
                table.execute(
                    "INSERT INTO records VALUES (?, ?, ?, CAST(? AS TEXT), 0, ?, -1, ?, 7)",
                    (record_id, label, record_id in labeled, to_utf8(name), place, len(image)),
                )
                if record_id in skipped:
                    continue
                framed = image_record(label, record_id, image)
                multipart += is_multipart(framed)
                table.execute(
                    "INSERT INTO written VALUES (?, ?, ?, ?, ?)",
                    (record_id, len(content), len(framed), len(image), zlib.crc32(image)),
                )
                records[record_id] = Record(
                    record_id, label, name, image, file, len(content), start
                )
                content += framed
            number += count
            (root / file).write_bytes(content)
            table.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, 'c', 's')",
                (len(entries), prefix, file, first, count, len(content)),
            )
            entry = {
                "file": file,
                "prefix": prefix,
                "bytes": len(content),
                "records": sum(record.file == file for record in records.values()),
                "sha256": hashlib.sha256(content).hexdigest(),
                "multipart": multipart,
                "first_id": first,
            }
            if not single:
                entry["idx"] = file.removesuffix("rec") + "idx"
                local = "".join(
                    f"{record.id}\t{record.offset}\n"
                    for record in records.values()
                    if record.file == file
                )
                entry["idx_sha256"] = _write(root / str(entry["idx"]), local)
            entries.append(entry)
            start += len(content)
    table.close()
    pack = SmallPack(root, records)
    _finish(pack, entries, layout, labeled)
    return pack


def _finish(
    pack: SmallPack, entries: list[dict[str, Any]], layout: str, labeled: Collection[int]
) -> None:
    splits = {}
    for prefix in dict.fromkeys(entry["prefix"] for entry in entries):
        chosen = [
            r for r in pack.records.values() if r.file.startswith((f"{prefix}.", f"{prefix}-"))
        ]
        name = SPLITS.get(prefix, prefix)
        splits[name] = _write_split(pack.root, entries, prefix, prefix, chosen)
        if layout == "shared" and prefix == "train":
            some = [record for record in chosen if record.id in labeled]
            splits["labeled"] = _write_split(pack.root, entries, prefix, "train_label", some)
            splits["unlabeled"] = _write_split(pack.root, entries, prefix, "train_unlabel", chosen)
    classes = "".join(f"{name}\n" for name in CLASSES)
    sizes = [len(record.image) for record in pack.records.values()]
    manifest = {
        "format": FORMAT,
        "tool": "mpl_fast",
        "created": "2026-01-01T00:00:00Z",
        "plan_sha256": "0" * 64,
        "layout": layout,
        "options": {"labeled": "some", "balance": "count", "split_seed": 0, "unlabeled": "all"},
        "sources": [
            {"spec": "source", "kind": "folder", "bytes": sum(sizes), "images": len(sizes)}
        ],
        "classes": {
            "n": len(CLASSES),
            "file": CLASSES_FILE,
            "sha256": _write(pack.root / CLASSES_FILE, classes),
        },
        "transform": {"mode": "none"},
        "shards": entries,
        "splits": splits,
        "table": TABLE,
        "table_sha256": hashlib.sha256((pack.root / TABLE).read_bytes()).hexdigest(),
        "bad": [],
        "duplicates": {"groups": 0, "images": 0, "across_splits": 0},
        "totals": {
            "images": len(sizes),
            "bytes_in": sum(sizes),
            "bytes_out": sum(entry["bytes"] for entry in entries),
            "seconds": 1.0,
        },
    }
    _write(pack.root / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_split(
    root: Path, entries: list[dict[str, Any]], prefix: str, name: str, chosen: list[Record]
) -> dict[str, Any]:
    files = [entry["file"] for entry in entries if entry["prefix"] == prefix]
    index = "".join(padded_lines((r.id, files.index(r.file), r.start + r.offset) for r in chosen))
    listing = "".join(f"{record.id}\t{record.label}\t{record.key}\n" for record in chosen)
    counts = Counter(record.label for record in chosen)
    per_class = [counts[label] for label in range(len(CLASSES))]
    return {
        "records": len(chosen),
        "shards": files,
        "idx": f"{name}.idx",
        "idx_sha256": _write(root / f"{name}.idx", index),
        "lst": f"{name}.lst",
        "lst_sha256": _write(root / f"{name}.lst", listing),
        "per_class_min": min(per_class),
        "per_class_max": max(per_class),
    }


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()
