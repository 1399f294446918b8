"""The info command: content of a finished pack, or progress of an unfinished one."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.data.records import NO_LABEL
from mpl_fast.first_few import first_few
from mpl_fast.packing.check.listing_check import splits_with_shards
from mpl_fast.packing.check.load_pack import load_pack, require_table
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import TABLE, open_table, source_entry
from mpl_fast.packing.publish.out_folder import WORK
from mpl_fast.packing.write.shard_receipt import receipt_path

_KEPT = (
    *("tool", "created", "resplit", "plan_sha256", "layout", "sources", "transform", "options"),
    *("bad", "duplicates", "totals"),
)


def info(root: Path, *, classes: bool = False) -> Json:
    """Return what a folder contains; if it is not finished, how many of its shards are.

    With classes, also the records of each class in each split, if it is not finished the planned
    ones.
    """
    if (root / WORK / TABLE).is_file() and not (root / MANIFEST).exists():
        listed = {"per_class": _per_class(root / WORK / TABLE, "")} if classes else {}
        return _unfinished(root) | listed
    manifest = load_pack(root)
    listed = {}
    if classes:
        require_table(root, manifest)
        listed["per_class"] = _per_class(root / TABLE, "JOIN written USING (id)")
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    splits = {
        name: {
            "records": split["records"],
            "per_class_min": split.get("per_class_min"),
            "per_class_max": split.get("per_class_max"),
            "with_label": split.get("with_label", split["records"]),
            "shards": len(split["shards"]),
            "shard_bytes": sum(shards[file]["bytes"] for file in split["shards"]),
            "shard_records": sum(shards[file]["records"] for file in split["shards"]),
            "idx": split["idx"],
        }
        for name, split in manifest["splits"].items()
    }
    return {
        "finished": True,
        "classes": manifest["classes"]["n"],
        "splits": splits,
        "shards": dict(Counter(shard["prefix"] for shard in manifest["shards"])),
        **{name: manifest.get(name) for name in _KEPT},
        **listed,
    }


def _per_class(path: Path, join: str) -> list[Json]:
    """Return each class of a table by label, with its records, by splits with any labels."""
    with open_table(path) as table:
        names, titles, counts = table.classes(), table.titles(), {}
        for split, shards in splits_with_shards(table):
            found: Counter[int] = Counter()
            which = "" if split.labeled is None else f"AND labeled = {split.labeled}"
            for shard in shards:
                query = (
                    f"SELECT label, count(*) FROM records {join} WHERE id BETWEEN ? AND ? "
                    f"AND label != {NO_LABEL} {which} GROUP BY label"
                )
                found.update(dict(table.query(query, shard.ids)))
            if found:
                counts[split.name] = found
    return [
        {
            "label": label,
            "name": name,
            "title": titles[label] if titles else "",
            "records": {split: found[label] for split, found in counts.items()},
        }
        for label, name in enumerate(names)
    ]


def _unfinished(root: Path) -> Json:
    work = root / WORK
    with open_table(work / TABLE) as table:
        shards, sources, options = table.shards(), table.sources(), table.options()
        classes = len(table.classes())
    done = [shard for shard in shards if receipt_path(work, shard.file).exists()]
    return {
        "finished": False,
        "classes": classes,
        "shards_done": len(done),
        "shards_planned": len(shards),
        "records_done": sum(shard.records for shard in done),
        "records_planned": sum(shard.records for shard in shards),
        "missing": [shard.file for shard in shards if shard not in done],
        "sources": [source_entry(source, options) for source in sources],
        "options": options,
    }


def info_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the result of info as aligned lines of text."""
    rows = list(_unfinished_rows(found) if not found["finished"] else _finished_rows(found))
    rows += _class_rows(found.get("per_class", []))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{text}" for name, text in rows]


def _unfinished_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    again = "run the same pack command again, for every part"
    ready = "all parts are there; run make_rec.py finish"
    yield "state", f"not finished; {again if found['missing'] else ready}"
    shards = f"{found['shards_done']} of {found['shards_planned']} done"
    missing = f"; missing: {first_few(found['missing'], 3)}" if found["missing"] else ""
    yield "shards", shards + missing
    yield "records", f"{found['records_done']} of {found['records_planned']} done"
    yield "classes", str(found["classes"])
    yield from _settings(found)


def _finished_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "layout", str(found["layout"])
    yield "packed", f"{found['created']} by {found['tool']}"
    if found["resplit"]:
        yield "resplit", found["resplit"]
    yield "classes", str(found["classes"])
    for name, split in found["splits"].items():
        # The bytes of a part of the records are stored nowhere.
        whole = split["records"] == split["shard_records"]
        size = f"{split['shard_bytes'] / 1e9:.3f} GB" if whole else "shared with other splits"
        files = f"{split['shards']} .rec, {size}, by {split['idx']}"
        yield name, f"{split['records']:>10} records, {per_class(split)}, in {files}"
    totals = found["totals"]
    read, written = totals["bytes_in"] / 1e9, totals["bytes_out"] / 1e9
    yield "written", f"{totals['images']:>10} records, {read:.3f} GB of images as {written:.3f} GB"
    yield from _settings(found)
    yield "transform", _pairs(found["transform"])
    yield "bad images", _pairs(Counter(entry["action"] for entry in found["bad"])) or "none"
    counts = {name: count for name, count in found["duplicates"].items() if name != "examples"}
    yield "duplicates", _pairs(counts)


def _class_rows(classes: Sequence[Json]) -> Iterator[tuple[str, str]]:
    for entry in classes:
        title = f" ({entry['title']})" if entry["title"] else ""
        counts = entry["records"].items()
        listed = (
            f"{split} {count}" if count else f"no image in {split}" for split, count in counts
        )
        yield f"class {entry['label']}", f"{entry['name']}{title}: {', '.join(listed)}"


def per_class(split: Mapping[str, Any]) -> str:
    """Return the records of a class as text."""
    low, high = split["per_class_min"], split["per_class_max"]
    text = f"{low if low == high else f'{low} to {high}'} a class"
    labeled = split.get("with_label", split["records"])  # absent if all have one
    if labeled == split["records"]:
        return text
    return f"{labeled} of them with a label, {text}" if labeled else "none of them with a label"


def _settings(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in found["sources"]:
        size = f", {source['images']} images, {source['bytes']} bytes" if "bytes" in source else ""
        pool = ", unlabeled" if source.get("unlabeled") else ""
        yield "source", f"{source['spec']} ({source['kind']}{size}{pool})"
    yield "options", _pairs(found["options"])


def _pairs(fields: Mapping[str, Any]) -> str:
    shown = {
        name: shlex.join(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if value is not None
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())
