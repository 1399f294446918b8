"""Atomic writes: all or nothing, also when the writer or the disk fails."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpl_fast import atomic

CONTENT = bytes(range(256)) * 20_000  # longer than a buffer


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic.atomic_file(path) as file:
        file.write(CONTENT)
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == CONTENT
    sizes: list[int] = []
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert file.sha256 == atomic.sha256_of(path, sizes.append) == sha256
    assert file.size == sum(sizes) == len(CONTENT)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic.atomic_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [atomic.write_text, atomic.replace_text])
def test_a_link_at_the_temporary_name_is_not_followed(
    write: Callable[[Path, str], object], tmp_path: Path
) -> None:
    """It could be in a folder that somebody else has packed, or trained in."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "mine")
    write(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


def test_sync_precedes_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        synced = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {synced.name}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name} {target.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    atomic.write_bytes(tmp_path / "file", b"new")
    assert events == ["sync file.tmp", "rename file.tmp file", f"sync {tmp_path.name}"]
    del events[:]
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        with atomic.atomic_file(path, sync=False) as file:
            file.write(b"new")
    assert events == [f"rename {name}.tmp {name}" for name in "abc"]
    del events[:]
    atomic.sync_files(paths)
    assert sorted(events[:3]) == ["sync a", "sync b", "sync c"]
    assert events[3:] == [f"sync {tmp_path.name}"]
    atomic.sync_files([])


def test_a_failed_write_is_reported_in_place_of_the_error_it_caused(tmp_path: Path) -> None:
    """torch.save raises a RuntimeError of its own when a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with (
            pytest.raises(OSError, match="File too large"),
            atomic.atomic_file(tmp_path / "file") as file,
        ):
            try:
                file.write(CONTENT)
            except OSError as error:
                raise RuntimeError("unexpected pos 0 vs 1") from error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == []


@pytest.mark.parametrize("value", [{"a": [1, None]}, "text"])
def test_json_and_its_checksum(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "file.json"
    sha256 = atomic.write_json(path, value)
    assert json.loads(path.read_text()) == value
    assert sha256 == atomic.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_text_keeps_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", os.fsdecode(b"\xff.jpg\n"))
    assert (tmp_path / "file").read_bytes() == b"\xff.jpg\n"


def test_folders_that_cannot_be_synced_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    error = 22  # EINVAL: of some network file systems
    atomic.sync_folder(tmp_path)
    error = 5  # EIO
    with pytest.raises(OSError, match="Input/output error"):
        atomic.sync_folder(tmp_path)
