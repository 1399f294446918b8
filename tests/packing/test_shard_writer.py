"""The writer of shards: exact bytes with direct and buffered writes, and errors of the disk."""

import errno
import fcntl
import hashlib
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mpl_fast.packing.write import shard_writer
from mpl_fast.packing.write.shard_writer import ShardWriter

BUFFER = 1 << 16


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "BUFFER", BUFFER)


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def append(path: Path, *pieces: bytes) -> str:
    """Write a file with append; return the digest that finish gave."""
    with closing(ShardWriter(path)) as writer:
        for piece in pieces:
            writer.append(piece)
        return writer.finish()


def require_written(path: Path, digest: str, content: bytes) -> None:
    assert path.read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "sizes",
    [
        *([], [1], [4096], [BUFFER], [BUFFER - 4, 8], [BUFFER + 1, BUFFER - 1], [3 * BUFFER, 5]),
        [5 * BUFFER + 12, 3 * BUFFER + 4],
    ],
)
def test_appended_bytes_replace_an_older_file(tmp_path: Path, sizes: list[int]) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old" * (sum(sizes) + 1))
    pieces = [noise(size) for size in sizes]
    require_written(path, append(path, *pieces), b"".join(pieces))


def test_bytes_are_filled_in_place(tmp_path: Path) -> None:
    """Across one border of buffers and two; bytes behind the position are not written."""
    pieces = [noise(size) for size in (BUFFER - 8, 100, 2 * BUFFER, 7, 12)]
    with closing(ShardWriter(tmp_path / "x")) as writer:
        for piece in pieces:
            assert writer.fits(len(piece) + 50)
            writer.put(writer.position, b"!" * (len(piece) + 50))
            writer.put(writer.position, piece)
            writer.advance(len(piece))
        assert writer.position == sum(map(len, pieces))
        digest = writer.finish()
    require_written(tmp_path / "x", digest, b"".join(pieces))


@pytest.mark.parametrize("position", [0, 4, BUFFER - 4])
def test_capacity_of_the_ring(tmp_path: Path, position: int) -> None:
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
    require_written(tmp_path / "x", append(tmp_path / "x", content), content)
    assert len(refused) == 1


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda file, content, offset: real_write(file, content[:8192], offset)
    )
    content = noise(BUFFER + 8192 + 9)
    require_written(tmp_path / "x", append(tmp_path / "x", content), content)


@pytest.mark.parametrize("buffers", [0, 1, 4])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    """The error comes when the failed buffer is used again, at the latest at the end."""
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
        append(tmp_path / "y", bytes(buffers * BUFFER + 1))
