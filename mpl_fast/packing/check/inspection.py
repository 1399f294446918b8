"""What a folder of records tells about itself, finished or not."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpl_fast.atomic import sha256_of
from mpl_fast.data.manifest import MANIFEST, load_manifest
from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.plan.table import TABLE, reading
from mpl_fast.packing.publish.out_folder import WORK

Json = dict[str, Any]
_KEPT = (
    *("tool", "created", "plan_sha256", "layout", "sources", "transform", "options"),
    *("bad", "duplicates", "totals"),
)
_SHARD = {"file": str, "prefix": str, "bytes": int, "records": int, "sha256": str, "first_id": int}
_SPLIT = {"records": int, "shards": list, "idx": str, "idx_sha256": str, "lst": str}
_TOTALS = {"images": int, "bytes_in": int, "bytes_out": int, "seconds": (int, float)}
_ALL = {"totals": dict, "options": dict, "transform": dict, "sources": list, "bad": list}
_ALL |= {"table_sha256": str, "layout": str, "duplicates": dict}
_SOURCE = {"spec": str, "kind": str, "images": int, "bytes": int}
_BAD = {"action": str}


def load_pack(root: Path) -> Json:
    """Return the manifest of a finished folder; DataError tells what else the folder holds."""
    try:
        publishing = (root / WORK / MANIFEST).is_file()
        packing = (root / WORK).is_dir() and not (root / MANIFEST).exists()
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    if publishing:
        raise DataError(
            f"{root}: was stopped while its files got their names; run: make_rec.py finish {root}"
        )
    if packing:
        raise DataError(
            f"{root}: its packing is not finished; run the same pack command again, or after "
            "pack --part: make_rec.py finish"
        )
    manifest = load_manifest(root)
    try:
        entries: list[tuple[Json, Mapping[str, Any]]] = [(manifest, _ALL)]
        entries += [(manifest["totals"], _TOTALS)]
        entries += [(entry, _SHARD) for entry in manifest["shards"]]
        entries += [(entry, _SPLIT) for entry in manifest["splits"].values()]
        entries += [(entry, _SOURCE) for entry in manifest["sources"]]
        entries += [(entry, _BAD) for entry in manifest["bad"]]
        wrong = [
            name
            for entry, form in entries
            for name, kind in form.items()
            if not isinstance(entry[name], kind)
        ]
        known = {entry["file"] for entry in manifest["shards"]}
        wrong += [name for s in manifest["splits"].values() for name in {*s["shards"]} - known]
        wrong += [] if isinstance(manifest["classes"]["sha256"], str) else ["classes"]
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise DataError(f"{root / MANIFEST}: damaged ({first_few(wrong)}); pack again")
    return manifest


def require_table(root: Path, manifest: Mapping[str, Any]) -> None:
    """DataError when the table is not the one that the manifest was written with."""
    path = root / TABLE
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if found != manifest["table_sha256"]:
        raise DataError(
            f"{path}: damaged, its sha256 is not the manifest's; make_rec.py verify {root} tells "
            "what else is, then pack again"
        )


def info(root: Path) -> Json:
    """Return what a folder holds; of one that is not finished, how many of its shards are done."""
    if (root / WORK / TABLE).is_file() and not (root / MANIFEST).exists():
        return _unfinished(root)
    manifest = load_pack(root)
    prefixes = Counter(shard["prefix"] for shard in manifest["shards"])
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    splits = {
        name: {
            "records": split["records"],
            "per_class_min": split.get("per_class_min"),
            "per_class_max": split.get("per_class_max"),
            "shards": len(split["shards"]),
            "shard_bytes": sum(sizes[file] for file in split["shards"]),
            "idx": split["idx"],
        }
        for name, split in manifest["splits"].items()
    }
    return {
        "finished": True,
        "classes": manifest["classes"].get("n"),
        "splits": splits,
        "shards": dict(prefixes),
        **{name: manifest.get(name) for name in _KEPT},
    }


def _unfinished(root: Path) -> Json:
    work = root / WORK
    with reading(work / TABLE) as table:
        shards, sources, options = table.shards(), table.sources(), table.options()
        classes = len(table.classes())
    done = [shard for shard in shards if (work / f"{shard.file}.done").exists()]
    return {
        "finished": False,
        "classes": classes,
        "shards_done": len(done),
        "shards_planned": len(shards),
        "records_done": sum(shard.records for shard in done),
        "records_planned": sum(shard.records for shard in shards),
        "missing": [shard.file for shard in shards if shard not in done],
        "sources": [{"spec": source.spec, "kind": source.kind} for source in sources],
        "options": options,
    }


def info_lines(told: Mapping[str, Any]) -> list[str]:
    """Return what info returned for people, aligned, one fact a line."""
    rows = list(_unfinished_rows(told) if not told["finished"] else _finished_rows(told))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{text}" for name, text in rows]


def _unfinished_rows(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    again = "run the same pack command again, for every part"
    ready = "all parts are there; run make_rec.py finish"
    yield "state", f"not finished; {again if told['missing'] else ready}"
    shards = f"{told['shards_done']} of {told['shards_planned']} done"
    missing = f"; missing: {first_few(told['missing'], 3)}" if told["missing"] else ""
    yield "shards", shards + missing
    yield "records", f"{told['records_done']} of {told['records_planned']} done"
    yield "classes", str(told["classes"])
    yield from _settings(told)


def _finished_rows(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "layout", str(told["layout"])
    yield "packed", f"{told['created']} by {told['tool']}"
    yield "classes", str(told["classes"])
    for name, split in told["splits"].items():
        low, high = split["per_class_min"], split["per_class_max"]
        per_class = f"{low if low == high else f'{low} to {high}'} a class"
        files = f"{split['shards']} .rec, {split['shard_bytes'] / 1e9:.3f} GB"
        yield name, f"{split['records']:>10} records, {per_class}, in {files}, by {split['idx']}"
    totals = told["totals"] or {}
    if totals:
        yield (
            "written",
            f"{totals.get('images', 0):>10} records, {totals.get('bytes_in', 0) / 1e9:.3f} GB of "
            f"images as {totals.get('bytes_out', 0) / 1e9:.3f} GB",
        )
    yield from _settings(told)
    yield "transform", _pairs(told["transform"] or {})
    bad = Counter(entry["action"] for entry in told["bad"] or [])
    yield "bad images", _pairs(bad) if bad else "none"
    found = told["duplicates"] or {}
    yield "duplicates", _pairs({k: v for k, v in found.items() if k != "examples"})


def _settings(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in told["sources"] or []:
        size = f", {source['images']} images, {source['bytes']} bytes" if "bytes" in source else ""
        yield "source", f"{source['spec']} ({source['kind']}{size})"
    yield "options", _pairs(told["options"] or {})


def _pairs(fields: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in fields.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
