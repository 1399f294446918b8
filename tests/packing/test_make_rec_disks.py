"""make_rec on disks that are full, read-only or short of space: an error, then a second run."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpl_fast import atomic
from mpl_fast.packing.publish.out_folder import OutFolder
from tests.packing.packs import (
    error_of,
    hashes,
    identities,
    image_tree,
    jpeg,
    make_tree,
    names,
    pack,
    refuse,
    run,
    run_process,
)


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


def full_at(name: str, patch: pytest.MonkeyPatch) -> None:
    """Let the disk be full when the file `name` is written."""
    original = atomic._HashingFile.write

    def write(file: atomic._HashingFile, block: bytes) -> int:
        if Path(file.name).name == f"{name}.tmp":
            raise OSError(28, "No space left on device")
        return original(file, block)

    patch.setattr(atomic._HashingFile, "write", write)


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


def test_disk_that_is_too_small_or_fills(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tree, {f"train/ant/{at}.jpg": jpeg(at, 600) for at in range(100, 120)})  # 8 MB
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", "6", "--shards", 8,
              "-j", 2, "--check", "none")  # fmt: skip
    fresh = pack(*common, out=tmp_path / "fresh")
    with memory_disk(tmp_path / "disk", "6m") as disk:
        out = disk / "out"
        line = refuse(*common, "--out", out, status=3)
        assert line.endswith(" GB needed, 0.01 GB free on this disk")
        assert names(disk) == set()  # refused before any image was read
        # Images that become smaller may fit.
        run("pack", *common[:2], "--short-side", 64, "--labeled", "6", "--out", disk / "small")
        shutil.rmtree(disk / "small")
        with monkeypatch.context() as patch:  # space that another program takes meanwhile
            patch.setattr(OutFolder, "require_space", lambda folder, needed: None)
            line = refuse(*common, "--out", out, status=3)
        assert line == f"make_rec: error: {out / '.pack'}: No space left on device"
        assert names(out) == {".lock", ".pack"}
        kept = identities((out / ".pack").glob("*.rec"))
        assert 2 <= len(kept) < 16
        assert not list((out / ".pack").glob("*.tmp"))
        remount(disk, "size=20m")
        run("pack", *common, "--out", out)
        assert hashes(out) == hashes(fresh)
        again = identities(out.glob("*.rec"))
        assert {name: again[name] for name in kept} == kept


@pytest.mark.parametrize("kib", [4, 26])
def test_no_file_may_grow(tree: Path, tmp_path: Path, kib: int) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--out", out, "--labeled", "6")
    shards = ("--shards", 1 + kib // 26)
    line = error_of(run_process("pack", *common, *shards, status=3, limit=str(kib)))
    # The table is the largest file here: planning it fails, or completing it at the end.
    name = "records.sqlite.tmp" if kib == 26 else "plan.new"
    assert line == f"make_rec: error: {out}/.pack/{name}: cannot be written (disk I/O error)"
    assert names(out) == {".lock", ".pack"} if kib == 26 else not out.exists()
    run("pack", *common, *shards)
    fresh = pack(*common[:2], *common[4:], *shards, out=tmp_path / "fresh")
    assert hashes(out) == hashes(fresh)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", ["train-00001-of-00002.idx", "train.lst", "manifest.json"])
def test_disk_that_fills_at_the_end(
    tree: Path, tmp_path: Path, name: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--src", tree / "train", "--labeled", "6", "--shards", 2)
    out = tmp_path / "out"
    part = ("pack", *common, "--part", "1/1", "--out", out)
    last = ("finish", out) if parts else ("pack", *common, "--out", out)
    if parts:
        run(*part)
    with monkeypatch.context() as patch:
        full_at(name, patch)
        line = error_of(run(*last, status=3))
    assert line == f"make_rec: error: {out}: No space left on device"
    assert names(out) == {".lock", ".pack"}
    kept = identities((out / ".pack").glob("*.rec"))
    if parts:
        run(*part)
        assert identities((out / ".pack").glob("*.rec")) == kept
    run(*last)
    assert identities(out.glob("*.rec")) == kept
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_disk_that_fills_while_unpacking(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tgz", tmp_path / "out"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train"], check=True)
    common = ("pack", "--src", f"{archive}:train", "--out", out)
    line = error_of(run_process(*common, status=3, limit="4"))
    assert line.startswith(f"make_rec: error: {out}")
    assert line.endswith(": File too large")
    assert not out.exists()
