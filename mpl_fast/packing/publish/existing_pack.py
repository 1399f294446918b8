"""What a folder already holds, compared with what it shall hold: a finished pack is never lost."""

from dataclasses import dataclass
from typing import Any

from mpl_fast.data.manifest import MANIFEST, check_texts, load_manifest
from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import TABLE, Table, reading
from mpl_fast.packing.publish.out_folder import OutFolder
from mpl_fast.packing.write.shard_receipt import ShardReceipt

Json = dict[str, Any]
_DRAWN = {"labeled", "balance", "unlabeled", "split_seed"}  # options that resplit has
_REMEDY = "choose another --out, or --force to replace it"


@dataclass(frozen=True)
class ExistingPack:
    """A finished pack, and those of its .rec files that are gone or have another size."""

    manifest: Json
    broken: list[str]

    def require_equal(self, folder: OutFolder) -> None:
        """Return when the broken shards, packed again, are what they were; else OutputError."""
        for shard in self.manifest["shards"]:
            if shard["file"] in self.broken:
                done = ShardReceipt.load(folder.work / f"{shard['file']}.done")
                if done.sha256 != shard["sha256"]:
                    raise OutputError(
                        f"{folder.path}: {shard['file']}, packed again, is not what it was; with "
                        "another version of the image libraries? --force packs everything again"
                    )


def examine(folder: OutFolder, plan: Table, options: Json) -> ExistingPack:
    """Return the finished pack that folder holds; OutputError when it is not the planned one.

    Of the records only the sizes are looked at, all other files are compared with their sha256.
    """
    if MANIFEST not in folder.holdings():
        raise OutputError(
            f"{folder.path}: holds {folder.holdings()[0]} of an unknown pack; {_REMEDY}"
        )
    try:
        old = load_manifest(folder.path)
        check_texts(folder.path, old)
        with reading(folder.path / TABLE) as table:
            stamps = {shard.file: shard.stamps for shard in table.shards()}
        before = dict(old["options"])
        skipped = [remark["image"] for remark in old["bad"] if remark["action"] == "skipped"]
        broken = [shard["file"] for shard in old["shards"] if not _is_there(folder, shard)]
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"{folder.path}: holds a damaged pack ({error}); {_REMEDY}") from error
    if old.get("plan_sha256") != plan_digest(plan):
        what = changes(before, options) or "its source's files were others"
        others = {name for name in options if options[name] != before.get(name)}
        resplit = "make_rec.py resplit draws other labeled images for this one; else "
        drawn_anew = others and others <= _DRAWN and old.get("layout") == "shared"
        remedy = f"{resplit if drawn_anew else ''}{_REMEDY}"
        raise OutputError(f"{folder.path}: holds another pack ({what}); {remedy}")
    changed = [shard.file for shard in plan.shards() if stamps.get(shard.file) != shard.stamps]
    if changed:
        raise OutputError(
            f"{folder.path}: its source changed after it was packed (images of "
            f"{first_few(changed, 3)}); {_REMEDY}"
        )
    if skipped and options["on_bad"] == "fail":
        raise OutputError(
            f"{folder.path}: holds a pack that left out {len(skipped)} images that cannot be used "
            f"({first_few(skipped, 3)}); --on-bad skip agrees with that, or {_REMEDY}"
        )
    return ExistingPack(old, broken)


def changes(old: Json, new: Json) -> str:
    """Return which options differ, in one line; "" when none does."""
    return ", ".join(
        f"{name} was {old.get(name)}, now {value}"
        for name, value in new.items()
        if value != old.get(name)
    )


def _is_there(folder: OutFolder, shard: Json) -> bool:
    path = folder.path / shard["file"]
    return path.exists() and bool(path.stat().st_size == shard["bytes"])
