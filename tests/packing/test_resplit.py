"""A folder that is split again is the folder that packing with those options makes."""

import fcntl
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import ConfigError, DataError, OutputError, UserError
from mpl_fast.packing.check.verify import verify
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.resplit import resplit
from tests.packing.packs import (
    ROOT,
    environment,
    hashes,
    image_tree,
    names,
    pack,
    read_split,
    run,
)

FIRST: dict[str, Any] = {"labeled": "3", "split_seed": 0, "balance": "count", "unlabeled": "all"}


def again(root: Path, **changed: Any) -> dict[str, Any]:
    return resplit(root, **(FIRST | changed))


def options(drawn: dict[str, Any]) -> list[object]:
    flags = {name: f"--{name.replace('_', '-')}" for name in drawn}
    return [word for name, value in drawn.items() for word in (flags[name], value)]


def contents(root: Path) -> dict[str, object]:
    """What tells two packs apart; of the table its rows, not its pages."""
    found: dict[str, object] = {}
    for path in root.iterdir():
        if path.name == TABLE:
            with closing(sqlite3.connect(path)) as table:
                found[TABLE] = list(table.iterdump())
        elif path.name == MANIFEST:
            stored = json.loads(path.read_text())
            found[MANIFEST] = stored | {
                # The table is compared by its rows: edited, its bytes are others.
                **{"created": "", "table_sha256": ""},
                "totals": stored["totals"] | {"seconds": 0},
            }
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def sound(root: Path) -> bool:
    report = verify(root, deep=False, processes=1, progress=lambda *done: None)
    return not report.problems


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("resplit"))


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    return pack_tree(tree, tmp_path / "rec", FIRST)


def pack_tree(tree: Path, out: Path, drawn: dict[str, Any], *more: object) -> Path:
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 3)
    return pack(*sources, *options(drawn), *more, "-j", 1, out=out)


@pytest.mark.parametrize("change", ["crc32 = crc32 + 1", "offset = offset + 4", "length = 4"])
def test_damaged_table_is_refused(packed: Path, change: str) -> None:
    with closing(sqlite3.connect(packed / TABLE)) as table:
        table.execute(f"UPDATE written SET {change} WHERE id = 3")
        table.commit()
    before = contents(packed)
    with pytest.raises(DataError, match=r"records\.sqlite: damaged, its sha256 is not"):
        again(packed, labeled="6")
    assert contents(packed) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"labeled": "50%"},
        {"split_seed": 7},
        {"unlabeled": "rest"},
        {"labeled": "10", "balance": "proportional", "unlabeled": "rest", "split_seed": 2},
    ],
    ids=["more", "seed", "rest", "all at once"],
)
def test_it_is_what_packing_makes(
    tree: Path, packed: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    before = contents(packed)
    records = {path: path.stat().st_ino for path in packed.glob("*.rec")}
    manifest = again(packed, **changed)
    assert {path: path.stat().st_ino for path in packed.glob("*.rec")} == records
    assert contents(packed) != before
    other = pack_tree(tree, tmp_path / "other", FIRST | changed)
    assert contents(packed) == contents(other)
    assert manifest["splits"]["labeled"]["records"] == len(read_split(packed, "train_label"))
    assert sound(packed)
    again(packed)
    assert contents(packed) == before


def test_a_list_of_names_draws_too(tree: Path, packed: Path, tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("ant/3.jpg\nbee/0.jpg\ncat/2.png\n")
    again(packed, labeled=str(listed))
    assert {key for _, _, key, _ in read_split(packed, "train_label")} == {
        "ant/3.jpg",
        "bee/0.jpg",
        "cat/2.png",
    }
    again(packed, split_seed=3)
    assert contents(packed) == contents(
        pack_tree(tree, tmp_path / "other", FIRST | {"split_seed": 3})
    )


def test_images_that_were_left_out_took_part_in_the_draw(tmp_path: Path) -> None:
    """Otherwise another image would be labeled in place of each."""
    tree = image_tree(tmp_path)
    for name in ("ant/1.jpg", "bee/5.jpg", "cat/0.jpg"):
        (tree / "train" / name).write_bytes(b"no image")
    half = FIRST | {"labeled": "50%"}
    packed = pack_tree(tree, tmp_path / "rec", FIRST, "--on-bad", "skip")
    again(packed, labeled="50%")
    other = pack_tree(tree, tmp_path / "other", half, "--on-bad", "skip")
    assert contents(packed) == contents(other)
    assert len(read_split(packed, "train")) == 21


def test_packing_again_knows_the_new_split(tree: Path, packed: Path) -> None:
    again(packed, split_seed=5)
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 3, "--out", packed)
    same = run("pack", *sources, *options(FIRST | {"split_seed": 5}))
    assert "already complete" in same.stdout
    other = run("pack", *sources, *options(FIRST), status=OutputError.exit_code)
    assert "split_seed was 5, now 0" in other.stderr


@pytest.mark.parametrize(
    ("changed", "told", "kind"),
    [
        ({"labeled": "99"}, "that is 99 labeled images, the source has 24", ConfigError),
        ({"labeled": "absent.txt"}, "give a share", ConfigError),
        ({"labeled": "24", "unlabeled": "rest"}, "--unlabeled rest: no image is left", DataError),
    ],
)
def test_a_draw_that_cannot_be_leaves_the_folder_as_it_was(
    packed: Path, changed: dict[str, Any], told: str, kind: type[UserError]
) -> None:
    before = hashes(packed)
    with pytest.raises(kind, match=told):
        again(packed, **changed)
    assert hashes(packed) == before
    assert ".pack" not in names(packed)


def test_separate_records_cannot_be_split_again(tree: Path, tmp_path: Path) -> None:
    packed = pack_tree(tree, tmp_path / "rec", FIRST, "--layout", "separate")
    before = hashes(packed)
    with pytest.raises(ConfigError, match="only packs made with --layout shared"):
        again(packed)
    assert hashes(packed) == before


def test_folders_in_use_or_unfinished_are_refused(packed: Path, tmp_path: Path) -> None:
    before = hashes(packed)
    with (packed / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another make_rec is writing here"):
            again(packed)
    (packed / ".pack").mkdir()
    (packed / ".pack" / "train.rec.done").write_bytes(b"")
    (packed / ".pack" / TABLE).write_bytes(b"")
    with pytest.raises(OutputError, match="another pack into this folder is not finished"):
        again(packed)
    assert (packed / ".pack" / "train.rec.done").exists()
    shutil.rmtree(packed / ".pack")
    assert hashes(packed) == before
    with pytest.raises(DataError, match="no such folder"):
        again(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
from mpl_fast.packing.resplit import resplit

left = int(sys.argv[2])
replace = Path.replace
def counted(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
Path.replace = counted
resplit(Path(sys.argv[1]), labeled="6", split_seed=1, balance="count", unlabeled="rest")
"""


def test_killed_at_any_rename_it_is_the_old_pack_or_can_be_finished(packed: Path) -> None:
    old = contents(packed)
    new: dict[str, object] = {}
    for renames in range(20):
        command = [sys.executable, "-c", _KILLED, str(packed), str(renames)]
        path = {"PYTHONPATH": str(ROOT)}
        code = subprocess.run(command, env=environment() | path, timeout=60).returncode
        assert code in (0, -signal.SIGKILL)
        if code and (packed / MANIFEST).exists():
            assert contents(packed) == old
            again(packed)  # clears what was left, and changes nothing
            assert contents(packed) == old
            continue
        if code:
            with pytest.raises(DataError, match=r"run: make_rec\.py finish"):
                sound(packed)
            run("finish", packed)
        new = new or contents(packed)
        assert contents(packed) == new != old
        if code == 0:
            break
        again(packed)
    assert code == 0
    assert sound(packed)
    assert renames > 8
