"""make_rec run again: packs that are kept, refused, replaced, continued, or packed in parts."""

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mpl_fast.packing.publish.out_folder import open_out_folder
from tests.packing.packs import (
    hashes,
    identities,
    image_tree,
    jpeg,
    manifest_of,
    names,
    pack,
    read_split,
    refuse,
    run,
)

Identity = dict[str, tuple[int, int]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


# Refused options and folders in use.


def test_refusals(tree: Path, tmp_path: Path) -> None:
    train, val, out = tree / "train", tree / "val", tmp_path / "out"
    (tree / "val" / "dog").mkdir()
    (tree / "val" / "dog" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "far" / "a").mkdir(parents=True)
    (tmp_path / "far" / "a" / "late.jpg").write_bytes(jpeg(2))
    os.utime(tmp_path / "far" / "a" / "late.jpg", (10_500_000_000, 10_500_000_000))  # in 2302
    (tmp_path / "bad.txt").write_text("0.jpg\nant/9.jpg\n")
    for arguments, status, message in (
        (("--src", train, "--out", out, "--val", val), 4, "1 class is not in the training"),
        (("--src", train, "--out", train / "rec"), 2, "is inside the source"),
        (("--src", train, "--val", val, "--out", val), 2, "is inside the source"),
        (("--src", train, train, "--out", out), 4, f"24 of its images are in {train}, too: give"),
        (("--src", tmp_path / "none", "--out", out), 4, "none: no such folder or file"),
        (("--src", tmp_path / "file", "--out", out), 4, "damaged or not a tar archive"),
        (("--src", train, "--out", tmp_path / "file"), 3, "is a file, not a folder"),
        (("--src", train, "--out", tmp_path / "file" / "x"), 3, "Not a directory"),
        (("--src", train, "--out", out, "--labeled", "2"), 2, "choose at least 3"),
        (("--src", train, "--out", out, "--labeled", tmp_path / "bad.txt"), 4, "bad.txt: 1 name"),
        (("--src", train, "--out", out, "--shards", "0"), 2, "--shards 0: must be at least 1"),
        (("--src", train, "--out", out, "-j", "-1"), 2, "-j -1: must be at least 1"),
        (("--src", train, "--out", out, "--short-side", "0"), 2, "--short-side 0: must be"),
        (("--src", train, "--out", out, "--shard-size", "0"), 2, "0 is no size; write 512M"),
        (("--src", train, "--out", out, "--part", "3/2"), 2, "3/2 is no part; write 1/8"),
        (("--src", train, "--out", out, "--labeled", "24", "--unlabeled", "rest",
          "--layout", "separate"), 4, "no image"),
        (("--src", train, "--out", out, "--lable", "6"), 2, "did you mean --labeled?"),
        (("--src", train, "--out", out, "--shards", "two"), 2, "invalid int value: 'two'"),
        (("--src", train, "--out", out, "--check", "all"), 2, "invalid choice: 'all'"),
        (("--src", train), 2, "required: --out"),
        (("--src", "", "--out", out), 2, "--src: its value is empty"),
        (("--src", train, "--out", out, "--val", ""), 2, "--val: its value is empty"),
        (("--src", train, "--out", ""), 2, "--out: its value is empty"),
        (("--src", train, "--out", "x" * 300), 3, "File name too long"),
        (("--src", "x" * 300, "--out", out), 4, f"--src {'x' * 300}: File name too long"),
        (("--src", tmp_path / "loop", "--out", out), 4, "loop"),
        (("--src", train, "--out", tmp_path / "loop"), 3, "loop"),
        (("--src", tmp_path / "far", "--out", out, "--labeled", "1"), 4, "a/late.jpg: its time is"),
        (("--src", train, "--out", out, "--val-labels", "x"), 2, "there is no --val that needs"),
        (("--src", train, "--out", out, "--shard-size", "9" * 400), 2, "is no size"),
    ):  # fmt: skip
        assert message in refuse(*arguments, status=status)
    assert not out.exists()
    assert "required: COMMAND" in run(status=2).stderr
    assert f"{out}: no such folder" in refuse(out, command="finish", status=4)


def test_folder_in_use(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    common = ("--src", tree / "train", "--out", out, "--labeled", "6")
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (common, (*common, "--part", "1/2")):
            assert "another make_rec is writing here" in refuse(*arguments, status=3)
        fcntl.flock(lock, fcntl.LOCK_SH)  # as the packing of a part
        assert "another make_rec is writing here" in refuse(*common, status=3)
        assert "another make_rec is writing here" in refuse(out, command="finish", status=3)
    assert names(out) == {".lock"}
    run("pack", *common, "--quiet")


def test_unknown_records_are_not_overwritten(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_label.rec").write_text("from another tool")
    for part in ((), ("--part", "1/2")):
        line = refuse("--src", tree / "train", "--out", out, "--labeled", "6", *part, status=3)
        assert "holds train_label.rec of an unknown pack" in line
    assert "holds no plan; pack its parts first" in refuse(out, command="finish", status=4)
    assert (out / "train_label.rec").read_text() == "from another tool"


# A folder that holds a pack.


def test_a_finished_pack_is_kept_and_its_broken_shards_are_packed_again(
    tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 3,
              "--out", out)  # fmt: skip
    run("pack", *common)
    before, kept = hashes(out), identities(out.iterdir())
    done = run("pack", *common)
    assert done.stdout == f"{out}: already complete, nothing to do; verify checks every byte\n"
    assert identities(out.iterdir()) == kept
    gone, cut = out / "train-00001-of-00003.rec", out / "val-00002-of-00003.rec"
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-4])
    done = run("pack", *common)
    assert done.stdout == f"{out}: packed again: {gone.name}, {cut.name}\n"
    assert hashes(out) == before
    assert packed_again(out, kept) == {gone.name, cut.name}
    gone.unlink()
    (tree / "train" / "ant" / "3.jpg").write_bytes(jpeg(1, 40))
    assert "holds another pack (its source's files were others)" in refuse(*common, status=3)


def test_force_replaces_all_of_the_old_pack_or_nothing(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", "6", "--force")
    old = ("--val", tree / "val", "--shards", 2, "--layout", "separate")
    out = pack(*common, *old, out=tmp_path / "out")
    (out / "notes.txt").write_text("the user's own")
    (out / "mine").mkdir()
    before = identities(out.iterdir())
    image = tree / "train" / "ant" / "0.jpg"
    content = image.read_bytes()
    image.write_bytes(b"words")
    refuse(*common, "--out", out, status=4)
    assert identities(path for path in out.iterdir() if path.name != ".pack") == before
    image.write_bytes(content)
    run("pack", *common, "--out", out)
    assert (out / "notes.txt").read_text() == "the user's own"
    (out / "notes.txt").unlink()
    (out / "mine").rmdir()
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


# A run that ended early: finished shards stay, what changed is packed again.


class Stopped(NamedTuple):
    """A pack of which all shards but one are finished."""

    out: Path
    common: tuple[object, ...]  # options
    missing: str
    kept: Identity  # of the others
    fresh: Path  # the same pack, never stopped


def shard_of(key: str, fresh: Path) -> str:
    """Return the shard of a finished pack that holds an image."""
    (row,) = [row for row in read_split(fresh, "train") if row[2] == key]
    for path in sorted(fresh.glob("train-*.idx")):
        if any(line.startswith(f"{row[0]}\t") for line in path.read_text().splitlines()):
            return f"{path.stem}.rec"
    raise AssertionError(f"{key} is in no shard")


@pytest.fixture
def stopped(tree: Path, tmp_path: Path) -> Stopped:
    """Stopped by an image that was damaged, and is repaired now."""
    image, out = tree / "train" / "bee" / "3.jpg", tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 4)
    fresh = pack(*common, out=tmp_path / "fresh")
    content = image.read_bytes()
    image.write_bytes(b"words" + bytes(len(content) - 5))
    assert "bee/3.jpg: no image by its first bytes" in refuse(*common, "--out", out, status=4)
    image.write_bytes(content)
    assert names(out) == {".lock", ".pack"}
    kept = identities((out / ".pack").glob("*.rec"))
    missing = shard_of("bee/3.jpg", fresh)
    assert set(kept) == {path.name for path in fresh.glob("*.rec")} - {missing}
    return Stopped(out, common, missing, kept, fresh)


def packed_again(out: Path, kept: Identity) -> set[str]:
    now = identities(out.glob("*.rec"))
    return {name for name in now if now[name] != kept.get(name)}


@pytest.mark.parametrize("damaged", [False, True])
def test_finished_shards_stay_unless_they_are_damaged(stopped: Stopped, damaged: bool) -> None:
    out, common, missing, kept, fresh = stopped
    again = {missing}
    if damaged:
        first, second = sorted(kept)[:2]
        flipped = bytearray((out / ".pack" / first).read_bytes())
        flipped[len(flipped) // 2] ^= 1
        (out / ".pack" / first).write_bytes(flipped)
        (out / ".pack" / f"{second}.done").write_bytes(b"PK\3\4 damaged")
        again |= {first, second}
    done = run("pack", *common, "--out", out)
    assert (done.stderr == "") != damaged
    assert packed_again(out, kept) == again
    pack(*common, "--force", out=fresh)  # the repaired image has another time
    assert hashes(out) == hashes(fresh)


def test_other_options_lose_nothing_unless_forced(stopped: Stopped, tmp_path: Path) -> None:
    out, common, missing, kept, fresh = stopped
    other = (*common, "--shards", 2, "--quality", 80)
    line = refuse(*other, "--out", out, status=3)
    assert (
        "holds an unfinished pack with other options (shards was 4, now 2, quality was 90, " in line
    )
    assert "3 of its 3 finished shards would be lost; go on with those, choose another" in line
    assert identities((out / ".pack").glob("*.rec")) == kept
    copy = shutil.copytree(out, tmp_path / "copy")
    # Another draw and another way to treat bad images change no shard.
    options = (*common, "--labeled", 9, "--on-bad", "skip")
    assert run("pack", *options, "--out", out).stderr == ""
    assert packed_again(out, kept) == {missing}
    assert len(read_split(out, "train_label")) == 9
    assert hashes(out) == hashes(pack(*options, "--force", out=fresh))
    run("pack", *other, "--out", copy, "--force")
    assert hashes(copy) == hashes(pack(*other, "--force", out=fresh))


def test_only_shards_with_changed_images_are_packed_again(stopped: Stopped, tree: Path) -> None:
    out, common, missing, kept, fresh = stopped
    ants = {path: shard_of(f"ant/{path.name}", fresh) for path in (tree / "train/ant").iterdir()}
    image, changed = next(item for item in ants.items() if item[1] != missing)
    old = image.read_bytes()
    image.write_bytes(old[:-2] + b"  " + old[-2:])  # no longer by more than moves no shard's border
    done = run("pack", *common, "--out", out)
    assert f"warning: packed again: 1 of 3 finished shards: {changed}" in done.stderr
    assert packed_again(out, kept) == {changed, missing}
    assert hashes(out) == hashes(pack(*common, "--force", out=fresh))
    rows = {row[2]: row[3] for row in read_split(out, "train")}
    assert rows[f"ant/{image.name}"] == image.read_bytes()


def test_changed_archive_is_read_anew(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tar", tmp_path / "out"
    options = ("--src", archive, "--labeled", 6, "--shards", 4, "--out", out)
    (tree / "train" / "bee" / "3.jpg").write_bytes(b"words")
    subprocess.run(["tar", "-C", tree / "train", "-cf", archive, "."], check=True)
    refuse(*options, status=4)
    kept = identities((out / ".pack").glob("*.rec"))
    assert len(kept) == 3
    archive.write_bytes(archive.read_bytes())  # another time: any image may be another one
    done = run("pack", *options, status=4)
    assert "warning: packed again: 3 of 3 finished shards" in done.stderr
    now = identities((out / ".pack").glob("*.rec"))
    assert {name for name in now if now[name] != kept[name]} == set(kept)


def test_shard_that_left_images_out_is_no_shard_of_a_strict_pack(
    tree: Path, tmp_path: Path
) -> None:
    image, out = tree / "train" / "ant" / "0.jpg", tmp_path / "out"
    image.write_bytes(b"words")
    common = ("--src", tree / "train", "--labeled", "12", "--shards", 2, "--out", out)
    run("pack", *common, "--on-bad", "skip", "--part", "1/1")
    line = refuse(*common, status=4)
    assert (
        f"1 image cannot be used, nothing was published: {image}: no image by its first bytes"
        in line
    )
    line = refuse(out, command="finish", status=4)
    assert f"with --on-bad skip lack 1 image: {image}" in line
    assert not (out / "manifest.json").exists()
    image.write_bytes(jpeg(1))
    run("pack", *common)
    assert len(read_split(out, "train")) == 24


def test_kill_when_all_files_have_their_names(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", "6", "--shards", 2, "--out", out)
    run("pack", *common)
    before = hashes(out)
    for command in (("finish", out), ("pack", *common), ("resplit", out, "--labeled", "6")):
        (out / ".pack").mkdir()  # as a kill within the removal of the work folder leaves it
        (out / ".pack" / "train-00000-of-00002.rec.done").write_bytes(b"PK")
        (out / ".pack" / "train-00000-of-00002.rec.lock").write_bytes(b"")
        run(*command)
        assert not (out / ".pack").exists()
        if command[0] != "resplit":
            assert hashes(out) == before


# Parts of a folder, then `finish`: the bytes of a single run.


def archive_of(tree: Path) -> tuple[Any, ...]:
    """Compress the tree; return options that pack it into 3 + 3 shards."""
    archive = tree.parent / "all.tar.gz"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train", "val"], check=True)
    return ("--src", f"{archive}:train", "--val", f"{archive}:val", "--labeled", 6, "--shards", 3)


def test_parts_are_the_pack(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    fresh = pack(*common, out=tmp_path / "fresh")
    done = run("pack", *common, "--part", "2/2", "--out", out)
    assert done.stdout.splitlines() == [
        "part 2/2: 3 shards are written", "3 shards of other parts are missing"]  # fmt: skip
    assert names(out) == {".lock", ".pack"}
    line = refuse(out, command="finish", status=4)
    assert line.endswith(
        "3 shards of the plan are not there: train-00000-of-00003.rec, "
        "train-00002-of-00003.rec, val-00001-of-00003.rec; pack them (every part), then finish"
    )
    other = (*common, "--shards", 2, "--part", "1/2", "--out", out)
    with open_out_folder(out, shared=True):  # while another part is being packed
        for force in ((), ("--force",)):
            line = refuse(*other, *force, status=3)
            assert "the parts of this pack have other options (shards was 3, now 2)" in line
    kept = identities((out / ".pack").glob("*.rec"))
    assert len(kept) == 3
    result = json.loads(run("pack", *common, "--part", "2/2", "--json", "--out", out).stdout)
    assert (result["part"], set(result["shards"])) == ("2/2", set(kept))
    assert len(result["shards_missing"]) == 3
    done = run("pack", *common, "--part", "1/2", "--out", out)
    assert done.stdout.endswith(f"every shard is there; now: make_rec.py finish {out}\n")
    assert done.stderr == ""  # the archive was unpacked once
    stored = json.loads(run("finish", out, "--json").stdout)
    assert stored == manifest_of(out)
    assert hashes(out) == hashes(fresh)
    now = identities(out.glob("*.rec"))
    assert {name: now[name] for name in kept} == kept
    before = identities(out.iterdir())
    assert json.loads(run("finish", out, "--json").stdout) == {"already_complete": True, **stored}
    assert "already complete" in run("pack", *common, "--part", "1/2", "--out", out).stdout
    line = refuse(*common[:-1], 4, "--part", "1/2", "--out", out, status=3)
    assert "holds a finished pack; choose another --out, or --force" in line
    assert identities(path for path in out.iterdir() if path.name in before) == before


def test_part_that_is_busy_or_damaged(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    for part in ("1/2", "2/2"):
        run("pack", *common, "--part", part, "--out", out)
    work = out / ".pack"
    with (work / "part-1-of-2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refuse(*common, "--part", "1/2", "--out", out, status=3)
    assert "part 1/2 is being packed by another make_rec" in line
    kept = identities(work.glob("*.rec"))
    shard = work / "train-00000-of-00003.rec"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (work / "train-00002-of-00003.rec.done").write_bytes(b"PK\3\4")
    assert "train-00002-of-00003.rec" in refuse(out, command="finish", status=4)
    run("pack", *common, "--part", "1/2", "--out", out)
    now = identities(work.glob("*.rec"))
    assert {name for name in now if now[name] != kept[name]} == {
        "train-00000-of-00003.rec", "train-00002-of-00003.rec"}  # fmt: skip
    run("finish", out)
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


@pytest.mark.parametrize("remedy", ["repair", "remove", "skip"])
def test_part_with_a_bad_image_has_a_way_out(tree: Path, tmp_path: Path, remedy: str) -> None:
    out, image = tmp_path / "out", tree / "train" / "bee" / "3.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:100])
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 4, "--out", out)
    # The image is in the shard of the first part.
    line = refuse(*common, "--part", "1/2", status=4)
    assert "bee/3.jpg" in line
    assert "run this part with --force" in line
    run("pack", *common, "--part", "2/2")
    more: tuple[object, ...] = ("--on-bad", "skip") if remedy == "skip" else ()
    if remedy == "repair":
        image.write_bytes(content)
    elif remedy == "remove":
        image.unlink()
    run("pack", *common, *more, "--part", "1/2", "--force")
    if remedy != "skip":  # sizes are others, so are the borders of shards
        run("pack", *common, "--part", "1/2")
        run("pack", *common, "--part", "2/2")
    run("finish", out)
    fresh = pack(*common[:-2], *more, out=tmp_path / "fresh")
    assert hashes(out) == hashes(fresh)


@pytest.mark.parametrize("shard", [0, 1])
def test_source_that_changes_between_the_parts(tree: Path, tmp_path: Path, shard: int) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 2)
    fresh = pack(*common, out=tmp_path / "fresh")
    run("pack", *common, "--part", "1/2", "--out", out)
    kept = identities((out / ".pack").glob("*.rec"))
    first = manifest_of(fresh)["shards"][shard]["first_id"]
    ants = {row[2] for row in read_split(fresh, "train")[first:][:10] if row[2].startswith("ant")}
    key = min(ants)
    image = tree / "train" / key
    image.write_bytes(jpeg(1, 12))
    if shard == 1:  # not packed yet
        line = refuse(*common, "--part", "2/2", "--out", out, status=4)
        assert f"{key}: {image} changed" in line
    # A run over all plans anew, and keeps what is the same.
    run("pack", *common, "--out", out)
    assert {row[2]: row[3] for row in read_split(out, "train")}[key] == jpeg(1, 12)
    now = identities(out.glob("*.rec"))
    assert (now["train-00000-of-00002.rec"] == kept["train-00000-of-00002.rec"]) == (shard == 1)
