"""A folder that is split again is the folder that packing with those options makes."""

import fcntl
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import ConfigError, DataError, OutputError, UserError
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.resplit import resplit
from tests.packing.packs import (
    LIMIT,
    ROOT,
    environment,
    hashes,
    identities,
    image_tree,
    names,
    pack,
    read_split,
    refuse,
    run,
    verified,
)

FIRST: dict[str, Any] = {"labeled": "3", "split_seed": 0, "balance": "count", "unlabeled": "all"}


def again(root: Path, **changed: Any) -> dict[str, Any]:
    return resplit(root, FIRST | changed)


def options(drawn: dict[str, Any]) -> list[object]:
    flags = {name: f"--{name.replace('_', '-')}" for name in drawn}
    return [word for name, value in drawn.items() for word in (flags[name], value)]


def contents(root: Path) -> dict[str, object]:
    """Return all that may differ between two packs; of the table its rows, not its pages."""
    found: dict[str, object] = {}
    for path in root.iterdir():
        if path.name == TABLE:
            with closing(sqlite3.connect(path)) as table:
                found[TABLE] = list(table.iterdump())
        elif path.name == MANIFEST:
            stored = json.loads(path.read_text())
            found[MANIFEST] = stored | {
                # The table is compared by its rows: edited, its bytes are others.
                **{"created": "", "resplit": "", "table_sha256": ""},
                "totals": stored["totals"] | {"seconds": 0},
            }
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("resplit"))


@pytest.fixture(scope="module")
def made(tree: Path) -> Path:
    return pack_tree(tree, tree.parent / "rec", FIRST)


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    """Return a copy of a pack that is made once."""
    return Path(shutil.copytree(made, tmp_path / "rec"))


def pack_tree(tree: Path, out: Path, drawn: dict[str, Any], *more: object) -> Path:
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 3)
    return pack(*sources, *options(drawn), *more, "-j", 1, out=out)


def test_damaged_table_is_refused(packed: Path) -> None:
    with closing(sqlite3.connect(packed / TABLE)) as table:
        table.execute("UPDATE written SET crc32 = crc32 + 1 WHERE id = 3")
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
        {"labeled": "10", "balance": "proportional", "unlabeled": "rest", "split_seed": 2},
        {"labeled": "names.txt"},
    ],
    ids=["more", "seed", "all at once", "names"],
)
def test_it_is_what_packing_makes(
    tree: Path, packed: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    before, records = contents(packed), identities(packed.glob("*.rec"))
    if changed.get("labeled") == "names.txt":
        listed = tmp_path / "names.txt"
        listed.write_text("ant/3.jpg\nbee/0.jpg\ncat/2.png\n")
        changed = {"labeled": str(listed)}
    manifest = again(packed, **changed)
    assert identities(packed.glob("*.rec")) == records
    assert contents(packed) != before
    other = pack_tree(tree, tmp_path / "other", FIRST | changed)
    assert contents(packed) == contents(other)
    assert manifest["splits"]["labeled"]["records"] == len(read_split(packed, "train_label"))
    assert not verified(packed).problems
    again(packed)
    assert contents(packed) == before


def test_images_that_were_left_out_took_part_in_the_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise another image would be labeled in place of each."""
    tree = image_tree(tmp_path)
    for name in ("ant/1.jpg", "bee/5.jpg", "cat/0.jpg"):
        (tree / "train" / name).write_bytes(b"no image")
    half = FIRST | {"labeled": "50%"}
    packed = pack_tree(tree, tmp_path / "rec", FIRST, "--on-bad", "skip")
    capsys.readouterr()
    again(packed, labeled="50%")
    warned = capsys.readouterr().err
    assert warned == "make_rec: warning: labeled images left out as bad: 2 of 12\n"
    other = pack_tree(tree, tmp_path / "other", half, "--on-bad", "skip")
    assert contents(packed) == contents(other)
    assert len(read_split(packed, "train")) == 21


def test_options_not_given_are_those_of_the_pack(tree: Path, packed: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant/3.jpg\nbee/0.jpg\ncat/2.png\n")
    first = FIRST | {"labeled": "12", "balance": "proportional", "unlabeled": "rest"}
    again(packed, **first)
    packing = json.loads((packed / MANIFEST).read_text())["created"]
    printed = run("resplit", packed, "--split-seed", 7).stdout.splitlines()
    assert contents(packed) == contents(pack_tree(tree, tmp_path / "a", first | {"split_seed": 7}))
    assert "labeled: 12 records before, 12 now, 4 a class" in printed
    assert printed[-1] == "options: split_seed was 0, now 7"
    before = contents(packed)
    assert run("resplit", packed).stdout.endswith("options: as before\n")
    assert contents(packed) == before
    printed = run("resplit", packed, "--labeled", names).stdout.splitlines()
    assert "labeled: 12 records before, 3 now, 1 a class" in printed
    assert "unlabeled: 12 records before, 21 now, 7 a class" in printed
    assert printed[-1] == f"options: labeled was 12, now {names}"
    run("resplit", packed, "--unlabeled", "all")
    listed = (packed / "train_label.lst").read_text()
    names.unlink()
    gone = refuse(packed, "--split-seed", 8, status=ConfigError.exit_code, command="resplit")
    assert f"are those of the file {names}, which is not there now" in gone
    assert gone.endswith("give --labeled")
    unknown = refuse(packed, "--out", "x", status=ConfigError.exit_code, command="resplit")
    assert unknown.endswith("unknown: --out (see --help)")  # and not like --quiet
    assert (packed / "train_label.lst").read_text() == listed
    rows = run("info", packed).stdout.splitlines()
    stored = json.loads((packed / MANIFEST).read_text())
    assert stored["created"] == packing < stored["resplit"]
    assert rows[1].split() == ["packed", packing, "by", *stored["tool"].split()]
    assert rows[2].split() == ["resplit", stored["resplit"]]


def test_packing_again_knows_the_new_split(tree: Path, packed: Path) -> None:
    again(packed, split_seed=5)
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 3, "--out", packed)
    same = run("pack", *sources, *options(FIRST | {"split_seed": 5}))
    assert "already complete" in same.stdout
    other = run("pack", *sources, *options(FIRST), status=OutputError.exit_code)
    assert "split_seed was 5, now 0" in other.stderr


@pytest.mark.parametrize(
    ("changed", "message", "kind"),
    [
        ({"labeled": "99"}, "that is 99 labeled images, the source has 24", ConfigError),
        ({"labeled": "absent.txt"}, "give a share", ConfigError),
        (
            {"labeled": "24", "unlabeled": "rest"},
            "unlabeled: none of its images is left",
            DataError,
        ),
    ],
)
def test_a_draw_that_cannot_be_leaves_the_folder_as_it_was(
    packed: Path, changed: dict[str, Any], message: str, kind: type[UserError]
) -> None:
    before = hashes(packed)
    with pytest.raises(kind, match=message):
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


@pytest.mark.parametrize("name", ["../train.rec", "..", "", "/train.rec", ".lock", "x.txt"])
@pytest.mark.parametrize("kind", ["file", "idx", "lst"])
def test_manifest_that_names_other_files_is_refused(packed: Path, name: str, kind: str) -> None:
    stored = json.loads((packed / MANIFEST).read_text())
    entry = stored["shards"][1] if kind == "file" else stored["splits"]["labeled"]
    before = entry[kind]
    stored = json.loads(json.dumps(stored).replace(json.dumps(before), json.dumps(name)))
    (packed / MANIFEST).write_text(json.dumps(stored))
    outside = packed.parent / "train.rec"
    outside.write_bytes(b"another's")
    found = hashes(packed)
    with pytest.raises(DataError, match=r"manifest\.json: damaged \(.*; pack again"):
        again(packed, labeled="6")
    assert outside.read_bytes() == b"another's"
    assert hashes(packed) == found


def test_records_that_the_manifest_lacks_are_kept(packed: Path) -> None:
    stored = json.loads((packed / MANIFEST).read_text())
    last = stored["shards"].pop()["file"]
    for split in stored["splits"].values():
        split["shards"] = [file for file in split["shards"] if file != last]
    (packed / MANIFEST).write_text(json.dumps(stored))
    found = hashes(packed)
    assert last in found
    with pytest.raises(DataError, match=rf"are not those of records\.sqlite \({last}\)"):
        again(packed, labeled="6")
    assert hashes(packed) == found


# Splits copies of a pack again, each in a process that is killed at another rename.
_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from mpl_fast.packing.resplit import resplit

root, replace = Path(sys.argv[1]), Path.replace

def killed_at(left):
    def counted(self, target):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return replace(self, target)
    return counted

code = renames = -1
while code:
    renames += 1
    copy = shutil.copytree(root, root.with_name(str(renames)))
    if not (child := os.fork()):
        Path.replace = killed_at(renames)
        resplit(copy, {"labeled": "6", "split_seed": 1, "balance": "count", "unlabeled": "rest"})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
print(renames)
"""


@pytest.mark.slow
def test_killed_at_any_rename_it_is_the_old_pack_or_can_be_finished(packed: Path) -> None:
    old = contents(packed)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(packed)],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    renames = int(done.stdout)
    assert renames > 8
    whole = packed.with_name(str(renames))
    assert not verified(whole).problems
    new = contents(whole)
    assert new != old
    for killed in (packed.with_name(str(number)) for number in range(renames)):
        if (killed / MANIFEST).exists():
            assert contents(killed) == old
            again(killed)  # clears what was left, and changes nothing
            assert contents(killed) == old
        else:
            with pytest.raises(DataError, match=r"run: make_rec\.py finish"):
                verified(killed)
            run("finish", killed)
            assert contents(killed) == new
