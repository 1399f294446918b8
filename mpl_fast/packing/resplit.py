"""The resplit command: other labeled images for a finished pack, without writing records again."""

import json
import shutil
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from mpl_fast.atomic import atomic_path, sha256_of, write_json
from mpl_fast.data.manifest import MANIFEST
from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.packing.check.load_pack import load_pack, require_table
from mpl_fast.packing.options import Json
from mpl_fast.packing.plan.choose_labeled import (
    Images,
    check_labeled,
    choose_labeled,
    mark,
)
from mpl_fast.packing.plan.prepare import warn
from mpl_fast.packing.plan.sharding import plan_digest
from mpl_fast.packing.plan.table import (
    TABLE,
    Table,
    edit_table,
    open_table,
    table_errors,
)
from mpl_fast.packing.publish.finish import describe_left_out
from mpl_fast.packing.publish.out_folder import open_out_folder
from mpl_fast.packing.publish.split_files import write_splits


def resplit(root: Path, drawn: Json, *, lock: bool = True) -> Json:
    """Draw the labeled images of a finished pack again; return its new manifest.

    drawn has some of the options named in DRAWN, the others stay as they are in the pack; the
    folder gets what packing with them would have made. The table is replaced too, since it stores
    which images are labeled. The old pack stays valid until the new one is complete. Raises
    ConfigError for a layout without shared records, DataError for a folder that is not finished,
    OutputError when it cannot be written.
    """
    load_pack(root)  # before anything is created in a folder that is no pack
    with open_out_folder(root, lock=lock) as folder, output_errors(root):
        if folder.finished():
            raise OutputError(
                f"{root}: another pack into this folder is not finished; run its command again, "
                "or remove its folder .pack"
            )
        folder.clear_work()  # a resplit may have been killed
        manifest = load_pack(root)
        if manifest["layout"] != "shared":
            raise ConfigError(
                f"{root}: its labeled images have records of their own; only packs made with "
                "--layout shared can be split again"
            )
        require_table(root, manifest)
        _require_same_shards(root, manifest)
        with atomic_path(folder.work / TABLE) as new:
            _draw(root / TABLE, new, drawn)
            with open_table(new) as table:
                manifest["plan_sha256"] = plan_digest(table)
                manifest["options"] = table.options()
                manifest["splits"] |= write_splits(
                    folder.work, table, manifest["shards"], ("labeled", "unlabeled")
                )
                warn([describe_left_out(table, manifest)])
            manifest["table_sha256"] = sha256_of(new)
        manifest["resplit"] = datetime.now(timezone.utc).isoformat()
        write_json(folder.work / MANIFEST, manifest)
        folder.publish()
    return manifest


def _require_same_shards(root: Path, manifest: Json) -> None:
    """DataError when the manifest lacks a .rec file of the table, which would be deleted."""
    with open_table(root / TABLE) as table:
        planned = {shard.file for shard in table.shards()}
    differ = planned ^ {entry["file"] for entry in manifest["shards"]}
    if differ:
        raise DataError(
            f"{root / MANIFEST}: damaged, its .rec files are not those of {TABLE} "
            f"({first_few(sorted(differ))}); pack again"
        )


def _draw(old: Path, new: Path, drawn: Json) -> None:
    """Copy the table old to new, with other labeled images and options."""
    shutil.copyfile(old, new)
    with table_errors(new), closing(edit_table(new)) as connection:
        table = Table(connection)
        options = table.options() | drawn
        if "labeled" not in drawn:
            _require_kept(options["labeled"])
        # All planned training images, bad ones too, as pack draws.
        rows = (
            "SELECT records.id AS id, label AS class, name FROM shards CROSS JOIN records "
            "ON records.id BETWEEN first_id AND first_id + shards.records - 1 "
            f"WHERE prefix = 'train' AND label != {NO_LABEL}"
        )
        seed, balance = options["split_seed"], options["balance"]
        connection.execute("BEGIN")
        connection.execute("UPDATE records SET labeled = 0 WHERE labeled")
        try:
            images = Images(connection, rows, table.classes())
            chosen = choose_labeled(images, options["labeled"], seed=seed, balance=balance)
        except DataError as error:
            if "val_seed" not in options:
                raise
            kept = f"--val {options['val']} has taken images, which stay validation images"
            raise DataError(f"{error} ({kept})") from error
        mark(connection, "UPDATE records SET labeled = 1 WHERE id", chosen)
        connection.execute("UPDATE plan SET options = ?", (json.dumps(options),))
        connection.execute("COMMIT")


def _require_kept(how: str) -> None:
    """ConfigError when how, by which the pack was made, is a file that is gone."""
    try:
        check_labeled(how)
    except ConfigError as error:
        raise ConfigError(
            f"the pack's labeled images are those of the file {how}, which is not there now (a "
            "relative path starts at the current folder); give --labeled"
        ) from error
