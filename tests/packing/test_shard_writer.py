"""A file gets the bytes that were filled in, direct or buffered, and a failed write is told."""

import errno
import fcntl
import hashlib
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mpl_fast.packing.write.shard_writer import BUFFER, ShardWriter


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def write(path: Path, *pieces: bytes) -> str:
    with closing(ShardWriter(path)) as writer:
        for piece in pieces:
            writer.append(piece)
        return writer.finish()


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [1],
        [4096],
        [BUFFER],
        [BUFFER - 4, 8],
        [BUFFER + 1, BUFFER - 1],
        [3 * BUFFER, 5],
        [5 * BUFFER + 12, 3 * BUFFER + 4],
    ],
)
def test_what_is_appended_is_written(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [noise(size) for size in sizes]
    digest = write(tmp_path / "x", *pieces)
    content = b"".join(pieces)
    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_an_older_longer_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old" * 9999)
    write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_bytes_are_filled_in_place(tmp_path: Path) -> None:
    """Over the borders of buffers, also over two; and what the position never passed is lost."""
    sizes = [BUFFER - 8, 100, 2 * BUFFER, 7, 12]
    pieces = [noise(size) for size in sizes]
    with closing(ShardWriter(tmp_path / "x")) as writer:
        for piece in pieces:
            assert writer.fits(len(piece) + 50)
            for view in writer.room(writer.position, len(piece) + 50):
                view[:] = b"!" * len(view)
            views = writer.room(writer.position, len(piece))
            assert sum(map(len, views)) == len(piece)
            at = 0
            for view in views:
                view[:] = piece[at : at + len(view)]
                at += len(view)
            writer.advance(len(piece))
        assert writer.position == sum(sizes)
        digest = writer.finish()
    content = b"".join(pieces)
    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("position", [0, 4, BUFFER - 4])
def test_the_ring_holds_what_fits(tmp_path: Path, position: int) -> None:
    most = 3 * BUFFER - position - 1
    with closing(ShardWriter(tmp_path / "x")) as writer:
        writer.append(bytes(position))
        assert writer.fits(most)
        assert len(writer.room(writer.position, most)) == 3
        assert not writer.fits(most + 1 + 4)


@pytest.mark.parametrize("when", ["opened", "first write", "second write"])
def test_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A file system refuses them when the file is opened, or only with a write."""
    refused = []
    real_write, real_control = os.pwrite, fcntl.fcntl
    limit = {"opened": -1, "first write": 0, "second write": 1}[when]

    def control(file: int, command: int, value: int = 0) -> int:
        if when == "opened" and value & os.O_DIRECT:
            refused.append(command)
            raise OSError(errno.EINVAL, "no direct writes here")
        return int(real_control(file, command, value))

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        direct = real_control(file, fcntl.F_GETFL) & os.O_DIRECT
        if when != "opened" and offset >= limit * BUFFER and not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct writes here")
        assert not (direct and refused)
        return real_write(file, content, offset)

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "pwrite", pwrite)
    content = noise(2 * BUFFER + 5)
    digest = write(tmp_path / "x", content)
    assert len(refused) == 1
    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_a_write_may_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda file, content, offset: real_write(file, content[: 1 << 20], offset)
    )
    content = noise(BUFFER + (1 << 20) + 9)
    write(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("buffers", [0, 1, 4])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    """No later than when the buffer that failed is needed again, or else at the end."""
    real_write = os.pwrite

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        if offset >= buffers * BUFFER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with (
        closing(ShardWriter(tmp_path / "x")) as writer,
        pytest.raises(OSError, match="No space left on device"),
    ):
        for _ in range(buffers + 4):
            writer.append(bytes(BUFFER))
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "y", bytes(buffers * BUFFER + 1))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ShardWriter(tmp_path / "no" / "x")
