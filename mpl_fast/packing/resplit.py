"""The resplit command: other labeled images for a finished pack, without writing records again."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from mpl_fast.atomic import sha256_of, sync_file, write_json
from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.packing.check.load_pack import load_pack, require_table
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.choose_labeled import choose_labeled
from mpl_fast.packing.plan.layout import planned_splits
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import TABLE, Table, edit_table, open_table, table_errors
from mpl_fast.packing.publish.out_folder import OutFolder
from mpl_fast.packing.publish.split_files import write_split

_DRAWN = ("labeled", "unlabeled")
_NEW = "resplit.sqlite"  # until it is complete: a file named TABLE would pass for a pack's plan


def resplit(root: Path, *, labeled: str, split_seed: int, balance: str, unlabeled: str) -> Json:
    """Draw the labeled images of a finished pack again; return its new manifest.

    The options are those of pack, and the folder gets what packing with them would have made. The
    table is replaced too, since it stores which images are labeled. The old pack stays valid until
    the new one is complete. Raises ConfigError for a layout without shared records, DataError for
    a folder that is not finished, OutputError when it cannot be written.
    """
    _require_shared(root, load_pack(root))
    drawn = {
        "labeled": labeled,
        "balance": balance,
        "unlabeled": unlabeled,
        "split_seed": split_seed,
    }
    with OutFolder(root) as folder, output_errors(root):
        if folder.finished():
            raise OutputError(
                f"{root}: another pack into this folder is not finished; run its command again, "
                "or remove its folder .pack"
            )
        folder.clear_work()  # a resplit may have been killed
        manifest = load_pack(root)
        _require_shared(root, manifest)
        require_table(root, manifest)
        new = folder.work / _NEW
        _draw(root / TABLE, new, drawn)
        with open_table(new) as table:
            manifest["plan_sha256"] = plan_digest(table)
            manifest["options"] = table.options()
            manifest["splits"] |= _write_splits(folder.work, table, manifest)
        manifest["created"] = datetime.now(timezone.utc).isoformat()
        manifest["table_sha256"] = sha256_of(new)
        new.replace(folder.work / TABLE)
        write_json(folder.work / MANIFEST, manifest)
        folder.publish()
    return manifest


def _require_shared(root: Path, manifest: Json) -> None:
    if manifest.get("layout") != "shared":
        raise ConfigError(
            f"{root}: its labeled images have records of their own; only packs made with --layout "
            "shared can be split again"
        )


def _draw(old: Path, new: Path, drawn: Json) -> None:
    """Copy the table old to new, with other labeled images and options."""
    with open_table(old) as table:
        options = table.options() | drawn
        how, seed, balance = drawn["labeled"], drawn["split_seed"], drawn["balance"]
        chosen = choose_labeled(_images(table), how, seed=seed, balance=balance)
    shutil.copyfile(old, new)
    with table_errors(new), closing(edit_table(new)) as connection:
        connection.execute("BEGIN")
        connection.execute("UPDATE records SET labeled = 0 WHERE labeled")
        connection.executemany(
            "UPDATE records SET labeled = 1 WHERE id = ?", ((number,) for number in sorted(chosen))
        )
        connection.execute("UPDATE plan SET options = ?", (json.dumps(options),))
        connection.execute("COMMIT")
    sync_file(new)


def _images(table: Table) -> Iterator[tuple[int, str, str]]:
    """Yield (id, class, name) of all planned training images, bad ones too, as pack draws."""
    classes = table.classes()
    for shard in table.shards():
        if shard.prefix == "train":
            query = "SELECT id, label, name FROM records WHERE id BETWEEN ? AND ?"
            for number, label, name in table.query(query, shard.ids):
                yield number, classes[label], name


def _write_splits(work: Path, table: Table, manifest: Json) -> Json:
    """Write the files of the splits that depend on the draw; return their manifest entries."""
    sizes = {entry["file"]: entry["bytes"] for entry in manifest["shards"]}
    shards = [shard for shard in table.shards() if shard.prefix == "train"]
    unlabeled = table.options()["unlabeled"]
    entries: Json = {}
    for split in planned_splits("shared", unlabeled, val=False):
        if split.name in _DRAWN:
            entry = write_split(work, table, split.stem, shards, sizes, split.labeled)
            if not entry["records"]:
                raise DataError(f"--unlabeled {unlabeled}: no image is left for {split.name}")
            entries[split.name] = entry
    return entries
