"""A receipt is loaded exactly as it was saved, or the file is reported as damaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.write.shard_receipt import COLUMNS, Remark, ShardReceipt

DONE = ShardReceipt(
    file="train-00000-of-00002.rec",
    content="c" * 64,
    stamps="s" * 64,
    size=1 << 40,
    checksum="5" * 8,
    bytes_in=7,
    multipart=1,
    reencoded=2,
    rotated=3,
    ids=np.array([0, 2, (1 << 32) - 1], np.uint32),
    offsets=np.array([0, 40, (1 << 40) + 4], np.uint64),
    lengths=np.array([40, 36, 1 << 29], np.uint32),
    sizes=np.array([5, 4, 0], np.uint32),
    crc32=np.array([1, (1 << 32) - 1, 0], np.uint32),
    remarks=[Remark(1, "cut \udcff short", "skipped"), Remark(2, "a PNG", "converted")],
)


def as_plain(done: ShardReceipt) -> dict[str, object]:
    return {
        name: value.tolist() if name in COLUMNS else value for name, value in vars(done).items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.done"
    DONE.save(path)
    return path


def test_load_returns_what_was_saved(path: Path) -> None:
    loaded = ShardReceipt.load(path)
    assert as_plain(loaded) == as_plain(DONE)
    for name, kind in COLUMNS.items():
        assert getattr(loaded, name).dtype == np.dtype(kind)
    assert list(path.parent.iterdir()) == [path]
    content = path.read_bytes()
    DONE.save(path)
    assert path.read_bytes() == content
    columns: dict[str, Any] = {name: np.array([], kind) for name, kind in COLUMNS.items()}
    empty = replace(DONE, **columns)
    empty.save(path)
    assert as_plain(ShardReceipt.load(path)) == as_plain(empty)


def test_a_flipped_bit_is_harmless_or_an_error(path: Path) -> None:
    whole = path.read_bytes()
    damaged = 0
    positions = range(0, len(whole), 11)
    for at in positions:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert as_plain(ShardReceipt.load(path)) == as_plain(DONE), f"byte {at}"
        except DataError as error:
            assert str(error).startswith(f"{path}: damaged (")
            assert "\n" not in str(error)
            damaged += 1
    assert damaged > len(positions) / 2


def test_cut_and_other_files(path: Path) -> None:
    whole = path.read_bytes()
    contents = [whole[:size] for size in (*range(0, len(whole), 17), len(whole) - 1)]
    np.save(path.with_suffix(".npy"), np.arange(3))
    np.savez(path.with_suffix(".npz"), np.frombuffer(b"[]", np.uint8))
    contents += [path.with_suffix(kind).read_bytes() for kind in (".npy", ".npz")]
    for content in (*contents, b"text", np.arange(3).tobytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.done: damaged .*; delete it and pack again"):
            ShardReceipt.load(path)
    path.unlink()
    with pytest.raises(DataError, match=r"x\.done: damaged .*No such file"):
        ShardReceipt.load(path)
