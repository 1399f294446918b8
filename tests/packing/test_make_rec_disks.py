"""tools/make_rec.py on disks that are full, read-only or unlike others: an error, then a rerun."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.packing.packs import hashes, identities, jpeg, image_tree, names, pack, refuse, run

from tests.packing.stopped_packs import run_meddled


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


@contextmanager
def memory_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of that size where this is allowed; else skip the test."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_read_only_folder(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", "6")
    with memory_disk(tmp_path / "disk", "20m") as disk:
        pack(*common, out=disk / "old")
        before = identities((disk / "old").iterdir())
        remount(disk, "ro")
        for name in ("old", "new"):
            line = refuse(*common, "--out", disk / name, "--force", status=3)
            assert line == f"make_rec: error: {disk / name}: Read-only file system"
        assert names(disk) == {"old"}
        assert identities((disk / "old").iterdir()) == before


def test_disk_that_fills(tree: Path, tmp_path: Path) -> None:
    for number in range(100, 120):  # some 30 MB
        (tree / "train" / "ant" / f"{number}.jpg").write_bytes(jpeg(number, 1200))
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", "6", "--shards", 8,
              "-j", 2, "--check", "none")  # fmt: skip
    fresh = pack(*common, out=tmp_path / "fresh")
    with memory_disk(tmp_path / "disk", "20m") as disk:
        out = disk / "out"
        line = refuse(*common, "--out", out, status=3)
        assert line.endswith(" GB needed, 0.02 GB free on this disk")
        assert names(disk) == set()  # told before any image was read
        # Space that another program takes meanwhile cannot be told beforehand.
        done = run_meddled("blind", "", "pack", *common, "--out", out)
        assert done.returncode == 3
        assert done.stderr == f"make_rec: error: {out / '.pack'}: No space left on device\n"
        assert names(out) == {".lock", ".pack"}
        kept = identities((out / ".pack").glob("*.rec"))
        assert 2 <= len(kept) < 16
        assert not list((out / ".pack").glob("*.tmp"))
        remount(disk, "size=60m")
        run("pack", *common, "--out", out)
        assert hashes(out) == hashes(fresh)
        again = identities(out.glob("*.rec"))
        assert {name: again[name] for name in kept} == kept


def test_images_that_become_smaller_may_fit(tree: Path, tmp_path: Path) -> None:
    for number in range(100, 120):  # some 30 MB
        (tree / "train" / "ant" / f"{number}.jpg").write_bytes(jpeg(number, 1200))
    with memory_disk(tmp_path / "disk", "20m") as disk:
        common = ("--src", tree / "train", "--labeled", "6", "--shards", 2)
        refuse(*common, "--out", disk / "out", status=3)
        run("pack", *common, "--short-side", 64, "--out", disk / "out")


@pytest.mark.parametrize("kib", [4, 26])
def test_no_file_may_grow(tree: Path, tmp_path: Path, kib: int) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out, "--labeled", "6")
    line = refuse(*common, "--shards", 1 + kib // 26, status=3, limit=str(kib))
    # The table is the largest file here: planning it fails, or completing it at the end.
    name = "records.sqlite.tmp" if kib == 26 else "plan.new"
    assert line == f"make_rec: error: {out}/.pack/{name}: cannot be written (disk I/O error)"
    assert names(out) == {".lock", ".pack"} if kib == 26 else not out.exists()
    run("pack", *common, "--shards", 1 + kib // 26)
    fresh = pack(*common[:2], *common[4:], "--shards", 1 + kib // 26, out=tmp_path / "fresh")
    assert hashes(out) == hashes(fresh)


@pytest.mark.parametrize("name", ["train-00001-of-00002.idx", "manifest.json"])
def test_disk_that_fills_at_the_end(tree: Path, tmp_path: Path, name: str) -> None:
    common = ("--src", tree / "train", "--labeled", "6", "--shards", 2)
    out = tmp_path / "out"
    done = run_meddled("full", name, "pack", *common, "--out", out)
    assert done.returncode == 3
    assert done.stderr == f"make_rec: error: {out}: No space left on device\n"
    assert names(out) == {".lock", ".pack"}
    run("pack", *common, "--out", out)
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_disk_that_fills_while_unpacking(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tgz", tmp_path / "out"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train"], check=True)
    line = refuse("--src", f"{archive}:train", "--out", out, status=3, limit="4")
    assert line.startswith(f"make_rec: error: {out}")
    assert line.endswith(": File too large")
    assert not out.exists()
