"""What a finished shard tells is read back as it was saved, or it is damaged; never wrong."""

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
    sha256="5" * 64,
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


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.done"
    DONE.save(path)
    loaded = ShardReceipt.load(path)
    assert as_plain(loaded) == as_plain(DONE)
    assert {name: getattr(loaded, name).dtype for name in COLUMNS} == {
        name: np.dtype(kind) for name, kind in COLUMNS.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x.done"]


def test_one_content_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        DONE.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_shard_without_records(tmp_path: Path) -> None:
    columns: dict[str, Any] = {name: np.array([], kind) for name, kind in COLUMNS.items()}
    empty = replace(DONE, **columns)
    empty.save(tmp_path / "x.done")
    assert as_plain(ShardReceipt.load(tmp_path / "x.done")) == as_plain(empty)


def test_a_flipped_bit_is_harmless_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.done"
    DONE.save(path)
    whole = path.read_bytes()
    damaged = 0
    tried = range(0, len(whole), 5)
    for at in tried:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert as_plain(ShardReceipt.load(path)) == as_plain(DONE), f"byte {at}"
        except DataError as error:
            assert str(error).startswith(f"{path}: damaged (")
            assert "\n" not in str(error)
            damaged += 1
    assert damaged > len(tried) / 2


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.done"
    DONE.save(path)
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 17), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"x\.done: damaged .*; delete it and pack again"):
            ShardReceipt.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"text", np.arange(3).tobytes()], ids=["empty", "text", "numbers"]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.done").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        ShardReceipt.load(tmp_path / "x.done")
    np.save(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(DataError, match="damaged"):
        ShardReceipt.load(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", np.frombuffer(b"[]", np.uint8))
    with pytest.raises(DataError, match="damaged"):
        ShardReceipt.load(tmp_path / "x.npz")
    with pytest.raises(DataError, match="damaged"):
        ShardReceipt.load(tmp_path / "none")
