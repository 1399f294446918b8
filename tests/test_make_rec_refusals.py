"""tools/make_rec.py on bad input and taken folders: one line, an exit code, nothing overwritten."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pack_command import (
    TOOL,
    jpeg,
    make_tree,
    png,
    refuse,
    run,
    sizes_and_hashes,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


def test_again_is_nothing_to_do(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out)
    run("pack", *common, "--labeled", "6")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = run("pack", *common, "--labeled", "6")
    assert done.stdout == f"{out}: already complete, nothing to do\n"
    line = refuse(*common, "--labeled", "9", status=3)
    assert "holds another pack (labeled was 6, now 9); choose another --out, or --force" in line
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    image = tree / "train" / "ant" / "0.jpg"
    os.utime(image, (time.time() + 999, time.time() + 999))  # tells nothing
    assert run("pack", *common, "--labeled", "6").stdout == done.stdout
    os.utime(image)
    assert "its source changed after it was packed" in refuse(*common, "--labeled", "6", status=3)
    image.write_bytes(jpeg(5, 20))
    line = refuse(*common, "--labeled", "6", status=3)
    assert "(its source's files were others)" in line
    (out / "train_label.lst").write_text("0\t0\tx\n")
    line = refuse(*common, "--labeled", "6", status=3)
    assert "train_label.lst: does not match the manifest" in line
    (out / "train_label.idx").write_text("0\t0\n")
    assert "holds a damaged pack" in refuse(*common, "--labeled", "6", status=3)


def test_force_replaces_all_of_the_old_pack(tree: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    common = ("--src", tree / "train", "--labeled", "6")
    run("pack", *common, "--val", tree / "val", "--shards", 2, "--out", out)
    (out / "notes.txt").write_text("the user's own")
    run("pack", *common, "--out", out, "--force")
    run("pack", *common, "--out", fresh)
    (out / "notes.txt").unlink()
    assert sizes_and_hashes(out) == sizes_and_hashes(fresh)


def test_unknown_records_are_not_overwritten(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_label.rec").write_text("from another tool")
    line = refuse("--src", tree / "train", "--out", out, "--labeled", "6", status=3)
    assert "holds train_label.rec of an unknown pack" in line
    assert (out / "train_label.rec").read_text() == "from another tool"


def test_faulty_images_are_all_named(tree: Path, tmp_path: Path) -> None:
    whole = (tree / "train" / "ant" / "7.jpg").read_bytes()
    large = jpeg(0, 100)
    picture = png(3)
    faults = {
        "ant/0.jpg": (b"", "empty file"),
        "ant/1.jpg": (whole[: len(whole) // 2], "cut short (no end-of-image mark)"),
        "ant/2.jpg": (b"words", "neither JPEG nor PNG"),
        "ant/3.jpg": (large[: len(large) // 2] + large[-2:], ""),  # decodes, half of it gray
        "bee/1.jpg": (b"GIF89a" + bytes(50), "neither JPEG nor PNG"),
        "cat/2.png": (picture[:-20], "cut short (no IEND chunk)"),
        "cat/3.jpg": (picture[:60] + bytes(4) + picture[64:], "damaged PNG chunk at byte 33"),
    }
    for key, (content, _) in faults.items():
        (tree / "train" / key).write_bytes(content)
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out, "--labeled", "12", "--shards", 2)
    line = refuse(*common, status=4)
    assert "7 images cannot be used, nothing was kept: " in line
    named = dict(part.split(": ", 1) for part in line.partition("kept: ")[2].split("; "))
    assert list(named) == [str(tree / "train" / key) for key in faults]
    for key, (_, reason) in faults.items():
        assert named[str(tree / "train" / key)].startswith(reason)
    assert not out.exists()
    # Looking only at the ends misses what is wrong in the middle, and nothing else.
    line = refuse(*common, "--check", "header", status=4)
    assert "5 images cannot" in line
    assert "ant/3.jpg" not in line
    assert "cat/3.jpg" not in line
    assert "1 images cannot be used" in refuse(*common, "--check", "none", status=4)


def test_faulty_images_of_every_source_are_named(tree: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tree / split / "ant" / "0.jpg").write_bytes(b"words")
    reason = "neither JPEG nor PNG"
    common = ("--out", tmp_path / "out", "--labeled", "6", "--check", "header")
    line = refuse("--src", tree / "train", "--val", tree / "val", *common, status=4)
    first, second = (tree / split / "ant" / "0.jpg" for split in ("train", "val"))
    assert line.endswith(f": 2 images cannot be used, nothing was kept: {first}: {reason}; "
                         f"{second}: {reason}")  # fmt: skip
    subprocess.run(["tar", "-C", tree, "-czf", tmp_path / "x.tgz", "train", "val"], check=True)
    places = [f"{tmp_path}/x.tgz:{split}" for split in ("train", "val")]
    line = refuse("--src", places[0], "--val", places[1], *common, status=4)
    assert f"{places[0]}: ant/0.jpg: {reason}; {places[1]}: ant/0.jpg: {reason}" in line


def test_long_list_of_faults_is_cut(tree: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tree / "train" / "ant" / f"x{number}.jpg").write_bytes(b"words")
    line = refuse("--src", tree / "train", "--out", tmp_path / "out", "--labeled", "6", status=4)
    assert "12 images cannot be used" in line
    assert line.endswith(" and 2 more")
    assert line.count("neither JPEG nor PNG") == 10


def test_failed_force_keeps_the_old_pack(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", "6", "--out", out)
    run("pack", *common)
    before = sizes_and_hashes(out)
    (tree / "train" / "ant" / "0.jpg").write_bytes(b"words")
    refuse(*common, "--force", status=4)
    assert sizes_and_hashes(out) == before


def test_refusals(tree: Path, tmp_path: Path) -> None:
    train, val, out = tree / "train", tree / "val", tmp_path / "out"
    (tree / "val" / "dog").mkdir()
    (tree / "val" / "dog" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "file").write_text("")
    for arguments, status, message in (
        (("--src", train, "--out", out, "--val", val), 4, "1 classes are not in the training"),
        (("--src", train, "--out", train / "rec"), 2, "lies inside the source"),
        (("--src", train, "--val", val, "--out", val), 2, "lies inside the source"),
        (("--src", tmp_path / "none", "--out", out), 4, "none: no such folder or archive"),
        (("--src", tmp_path / "file", "--out", out), 4, "damaged or not a tar archive"),
        (("--src", train, "--out", tmp_path / "file"), 3, "is a file, not a folder"),
        (("--src", train, "--out", tmp_path / "file" / "x"), 3, "Not a directory"),
        (("--src", train, "--out", out, "--labeled", "2"), 2, "ask for at least 3"),
        (("--src", train, "--out", out, "--shards", "0"), 2, "--shards 0: must be at least 1"),
        (("--src", train, "--out", out, "-j", "-1"), 2, "-j -1: must be at least 1"),
        (("--src", train, "--out", out, "--labeled", "24", "--unlabeled", "rest"), 4, "no image"),
        (("--src", train, "--out", out, "--lable", "6"), 2, "did you mean --labeled?"),
        (("--src", train, "--out", out, "--shards", "two"), 2, "invalid int value: 'two'"),
        (("--src", train, "--out", out, "--check", "all"), 2, "invalid choice: 'all'"),
        (("--src", train), 2, "required: --out"),
        (("--src", "", "--out", out), 2, "--src: its value is empty"),
        (("--src", train, "--out", out, "--val", ""), 2, "--val: its value is empty"),
        (("--src", train, "--out", ""), 2, "--out: its value is empty"),
        (("--src", train, "--out", "x" * 300), 3, "File name too long"),
    ):
        assert message in refuse(*arguments, status=status)
    assert not out.exists()
    assert "required: COMMAND" in run(status=2).stderr


def test_output_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = refuse("--src", tree / "train", "--out", out, "--labeled", "6", status=3, limit="4")
    assert line.endswith("out: File too large")
    assert not out.exists()


def test_two_runs_into_one_folder(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refuse("--src", tree / "train", "--out", out, "--labeled", "6", status=3)
    assert "another make_rec is writing here" in line
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "6", "--quiet")


def test_quiet_and_help(tree: Path, tmp_path: Path) -> None:
    done = run(
        "pack", "--src", tree / "train", "--out", tmp_path / "o", "--labeled", "6", "--quiet"
    )
    assert (done.stdout, done.stderr) == ("", "")
    for arguments in (("--help",), ("pack", "--help")):
        assert "make_rec" in run(*arguments).stdout
    script = f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(TOOL.parent)!r})\n"
    script += "import make_rec; print({'numpy', 'cv2', 'torch', 'nvidia'} & set(sys.modules))"
    done_import = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done_import.stdout == "set()\n"
