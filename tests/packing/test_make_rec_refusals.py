"""tools/make_rec.py on bad input and taken folders: one line, an exit code, nothing overwritten."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from tests.packing.packs import (
    command_line,
    hashes,
    identities,
    jpeg,
    image_tree,
    names,
    pack,
    refuse,
    run,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def test_again_is_nothing_to_do(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out)
    run("pack", *common, "--labeled", "6")
    before = identities(out.iterdir())
    done = run("pack", *common, "--labeled", "6")
    assert done.stdout == f"{out}: already complete, nothing to do; verify checks every byte\n"
    line = refuse(*common, "--labeled", "9", "--shards", 2, status=3)
    assert "holds another pack (labeled was 6, now 9, shards was None, now 2); choose" in line
    assert "or --force" in line
    assert identities(out.iterdir()) == before
    image = tree / "train" / "ant" / "0.jpg"
    image.write_bytes(image.read_bytes())  # another time: it may be another image
    line = refuse(*common, "--labeled", "6", status=3)
    assert "its source changed after it was packed (images of train.rec)" in line
    image.write_bytes(jpeg(5, 20))
    line = refuse(*common, "--labeled", "6", status=3)
    assert "(its source's files were others)" in line
    assert identities(out.iterdir()) == before
    (out / "train_label.lst").write_text("0\t0\tx\n")
    line = refuse(*common, "--labeled", "6", status=3)
    assert "train_label.lst: does not match the manifest" in line
    assert "holds a damaged pack" in line


def test_archive_that_changed_is_another_source(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tar", tmp_path / "out"
    subprocess.run(["tar", "-C", tree / "train", "-cf", archive, "."], check=True)
    common = ("--src", archive, "--labeled", 6, "--out", out)
    run("pack", *common)
    assert "already complete" in run("pack", *common).stdout
    # The same names, places and sizes: only the time tells.
    content = bytearray(archive.read_bytes())
    at = content.index(jpeg(8003)) + 300
    content[at] ^= 1
    archive.write_bytes(content)
    assert "its source changed after it was packed" in refuse(*common, status=3)


def test_shards_that_are_gone_or_cut_are_packed_again(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 3,
              "--out", out)  # fmt: skip
    run("pack", *common)
    before, kept = hashes(out), identities(out.glob("*.rec"))
    gone, cut = out / "train-00001-of-00003.rec", out / "val-00002-of-00003.rec"
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-4])
    done = run("pack", *common)
    assert done.stdout == f"{out}: packed again: {gone.name}, {cut.name}\n"
    assert hashes(out) == before
    now = identities(out.glob("*.rec"))
    assert {name for name in now if now[name] != kept[name]} == {gone.name, cut.name}
    gone.unlink()
    (tree / "train" / "ant" / "3.jpg").write_bytes(jpeg(1, 40))
    assert "holds another pack (its source's files were others)" in refuse(*common, status=3)


def test_force_replaces_all_of_the_old_pack(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", "6")
    out = pack(*common, "--val", tree / "val", "--shards", 2, "--layout", "separate",
               out=tmp_path / "out")  # fmt: skip
    (out / "notes.txt").write_text("the user's own")
    (out / "mine").mkdir()
    run("pack", *common, "--out", out, "--force")
    fresh = pack(*common, out=tmp_path / "fresh")
    assert (out / "notes.txt").read_text() == "the user's own"
    (out / "notes.txt").unlink()
    (out / "mine").rmdir()
    assert hashes(out) == hashes(fresh)


def test_failed_force_keeps_the_old_pack(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", "6", "--shards", 2)
    out = pack(*common, out=tmp_path / "out")
    before = identities(out.iterdir())
    (tree / "train" / "ant" / "0.jpg").write_bytes(b"words")
    refuse(*common, "--out", out, "--force", status=4)
    assert identities(path for path in out.iterdir() if path.name != ".pack") == before


def test_unknown_records_are_not_overwritten(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_label.rec").write_text("from another tool")
    for part in ((), ("--part", "1/2")):
        line = refuse("--src", tree / "train", "--out", out, "--labeled", "6", *part, status=3)
        assert "holds train_label.rec of an unknown pack" in line
    assert "holds no plan; pack its parts first" in refuse(out, command="finish", status=4)
    assert (out / "train_label.rec").read_text() == "from another tool"


def test_refusals(tree: Path, tmp_path: Path) -> None:
    train, val, out = tree / "train", tree / "val", tmp_path / "out"
    (tree / "val" / "dog").mkdir()
    (tree / "val" / "dog" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "far" / "a").mkdir(parents=True)
    (tmp_path / "far" / "a" / "late.jpg").write_bytes(jpeg(2))
    os.utime(tmp_path / "far" / "a" / "late.jpg", (10_500_000_000, 10_500_000_000))  # in 2302
    for arguments, status, message in (
        (("--src", train, "--out", out, "--val", val), 4, "1 classes are not in the training"),
        (("--src", train, "--out", train / "rec"), 2, "is inside the source"),
        (("--src", train, "--val", val, "--out", val), 2, "is inside the source"),
        (("--src", train, train, "--out", out), 4, "names occur more than once"),
        (("--src", tmp_path / "none", "--out", out), 4, "none: no such folder or file"),
        (("--src", tmp_path / "file", "--out", out), 4, "damaged or not a tar archive"),
        (("--src", train, "--out", tmp_path / "file"), 3, "is a file, not a folder"),
        (("--src", train, "--out", tmp_path / "file" / "x"), 3, "Not a directory"),
        (("--src", train, "--out", out, "--labeled", "2"), 2, "choose at least 3"),
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


def test_output_that_nobody_can_read(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", 6, "--out", tmp_path / "out")
    with Path("/dev/full").open("w") as full:
        line = command_line("pack", *common)
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr == "make_rec: error: standard output: No space left on device\n"
    assert "already complete" in run("pack", *common).stdout  # it was no fault of the pack


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
