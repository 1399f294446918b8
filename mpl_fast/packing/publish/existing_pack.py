"""Comparison of the finished pack in the output folder with the pack that is to be made."""

from mpl_fast.data.manifest import MANIFEST, check_texts, file_names, load_manifest
from mpl_fast.errors import DataError, OutputError
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.checksum import checksum_of, file_checksum
from mpl_fast.packing.options import DRAWN, Json
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import TABLE, Table, open_table
from mpl_fast.packing.publish.out_folder import OutFolder, is_pack_file

_REMEDY = "choose another --out, or --force to replace it"


def check_existing(folder: OutFolder, plan: Table, options: Json) -> tuple[Json, list[str]]:
    """Return the manifest of the finished pack in folder, and its .rec files that are broken.

    Those are missing or have another size; all other files are compared by their sha256. Raises
    OutputError when it is not the planned pack.
    """
    if MANIFEST not in folder.pack_files():
        raise OutputError(
            f"{folder.path}: holds {folder.pack_files()[0]} of an unknown pack; {_REMEDY}"
        )
    try:
        old = load_manifest(folder.path)
        if wrong := [name for name in file_names(old) if not is_pack_file(name)]:
            raise DataError(f"{MANIFEST} names {first_few(wrong)}")
        check_texts(folder.path, old)
        with open_table(folder.path / TABLE) as table:
            stamps = {shard.file: shard.stamps for shard in table.shards()}
        if lacking := stamps.keys() - {shard["file"] for shard in old["shards"]}:
            raise DataError(f"{MANIFEST} lacks {first_few(sorted(lacking))}")
        before = dict(old["options"])
        skipped = [remark["image"] for remark in old["bad"] if remark["action"] == "skipped"]
        broken = [shard["file"] for shard in old["shards"] if not _has_size(folder, shard)]
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"{folder.path}: holds a damaged pack ({error}); {_REMEDY}") from error
    if old.get("plan_sha256") != plan_digest(plan):
        _refuse_other_pack(folder, old, before, options)
    changed = [shard.file for shard in plan.shards() if stamps.get(shard.file) != shard.stamps]
    if changed:
        raise OutputError(
            f"{folder.path}: its source changed after it was packed (images of "
            f"{first_few(changed, 3)}); {_REMEDY}"
        )
    if skipped and options["on_bad"] == "fail":
        raise OutputError(
            f"{folder.path}: holds a pack that left out {counted(len(skipped), 'image')} that "
            f"cannot be used ({first_few(skipped, 3)}); --on-bad skip agrees with that, or "
            f"{_REMEDY}"
        )
    return old, broken


def _refuse_other_pack(folder: OutFolder, old: Json, before: Json, options: Json) -> None:
    what = changed_options(before, options) or "its source's files were others"
    others = {name for name in before | options if options.get(name) != before.get(name)}
    resplit = "make_rec.py resplit draws other labeled images for this one; else "
    drawn_anew = others and others <= {*DRAWN} and old.get("layout") == "shared"
    remedy = f"{resplit if drawn_anew else ''}{_REMEDY}"
    raise OutputError(f"{folder.path}: holds another pack ({what}); {remedy}")


def changed_options(old: Json, new: Json) -> str:
    """Return the options that differ, in one line; "" when none does."""
    return ", ".join(
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in new | old
        if new.get(name) != old.get(name)
    )


def _has_size(folder: OutFolder, shard: Json) -> bool:
    path = folder.path / shard["file"]
    return path.exists() and bool(path.stat().st_size == shard["bytes"])


def require_same(folder: OutFolder, manifest: Json, broken: list[str]) -> None:
    """OutputError when a broken shard, packed again, has other bytes than before."""
    for shard in manifest["shards"]:
        if shard["file"] in broken:
            kind, checksum = checksum_of(shard)
            if file_checksum(folder.work / shard["file"], kind) != checksum:
                raise OutputError(
                    f"{folder.path}: {shard['file']}, packed again, is not what it was; with "
                    "another version of the image libraries? --force packs everything again"
                )
