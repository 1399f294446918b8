"""Loads the manifest of a finished pack with all types checked, so that damage is one error."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import MANIFEST, file_names, load_manifest
from mpl_fast.errors import DataError
from mpl_fast.first_few import first_few
from mpl_fast.packing.check.shard_check import file_fault
from mpl_fast.packing.checksum import checksum_of
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.publish.out_folder import WORK, is_pack_file

_SHARD = {"file": str, "prefix": str, "bytes": int, "records": int, "first_id": int}
_INDEX = {"idx": str, "idx_sha256": str}
_SPLIT = {"records": int, "shards": list, **_INDEX, "lst": str, "lst_sha256": str}
_TOTALS = {"images": int, "bytes_in": int, "bytes_out": int, "seconds": (int, float)}
_ALL = {"totals": dict, "options": dict, "transform": dict, "sources": list, "bad": list}
_ALL |= {"table_sha256": str, "layout": str, "duplicates": dict}
_SOURCE = {"spec": str, "kind": str, "images": int, "bytes": int}
_BAD = {"action": str}


def load_pack(root: Path) -> Json:
    """Return the manifest of a finished folder. Raises DataError, with a remedy, for others."""
    try:
        publishing = (root / WORK / MANIFEST).is_file()
        packing = (root / WORK).is_dir() and not (root / MANIFEST).exists()
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    if publishing:
        raise DataError(
            f"{root}: was stopped during its final renames; run: make_rec.py finish {root}"
        )
    if packing:
        raise DataError(
            f"{root}: its packing is not finished; run the same pack command again, or after "
            "pack --part: make_rec.py finish"
        )
    manifest = load_manifest(root)
    try:
        entries: list[tuple[Json, Mapping[str, Any]]] = [(manifest, _ALL)]
        entries += [(manifest["totals"], _TOTALS), (manifest["classes"], {"n": int, "sha256": str})]
        entries += [(entry, {**_SHARD, checksum_of(entry)[0]: str}) for entry in manifest["shards"]]
        entries += [(entry, _INDEX) for entry in manifest["shards"] if "idx" in entry]
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
        wrong += [name for name in file_names(manifest) if not is_pack_file(name)]
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise DataError(f"{root / MANIFEST}: damaged ({first_few(map(str, wrong))}); pack again")
    return manifest


def require_table(root: Path, manifest: Mapping[str, Any]) -> None:
    """DataError when the table does not have the sha256 in the manifest."""
    fault = file_fault(root, TABLE, "sha256", manifest["table_sha256"])
    if fault:
        raise DataError(
            f"{root / TABLE}: damaged, {fault}; make_rec.py verify {root} lists all damage, then "
            "pack again"
        )
