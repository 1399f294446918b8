"""A shard is written from the files as they were planned, or not at all."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.data.records import IMAGE_LIMIT
from mpl_fast.errors import DataError
from mpl_fast.packing.plan import ShardPlan
from mpl_fast.packing.shard import StoppedError, write_shard
from mpl_fast.packing.sources import ImageFile


@pytest.fixture
def plan(tmp_path: Path) -> ShardPlan:
    """Return a plan of two files of their own and two ranges of a third."""
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "tar").write_bytes(b"----third--fourth")
    rows = [("a", 0, 5), ("b", 0, 6), ("tar", 4, 5), ("tar", 11, 6)]
    images = [
        ImageFile("ant", f"{row}.jpg", str(tmp_path / name), offset, size)
        for row, (name, offset, size) in enumerate(rows)
    ]
    return ShardPlan("x.rec", images, [0] * 4, 7, "none")


def test_ranges_are_read(plan: ShardPlan, tmp_path: Path) -> None:
    sizes: list[int] = []

    def advance(size: int) -> bool:
        sizes.append(size)
        return True

    result = write_shard(plan, tmp_path / "x", advance)
    content = (tmp_path / "x").read_bytes()
    ends = [*result.offsets[1:], len(content)]
    images = [
        content[start + 32 : end].rstrip(b"\0")
        for start, end in zip(result.offsets, ends, strict=True)
    ]
    assert images == [b"first", b"second", b"third", b"fourth"]
    assert sizes == [5, 6, 5, 6]
    assert (result.size, result.bytes_in) == (len(content), 22)
    assert result.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b", b"grown longer", "ant/1.jpg: .* changed while it was being packed"),
        ("b", b"less", "ant/1.jpg: .* changed while it was being packed"),
        ("tar", b"----third--four", "ant/3.jpg: .* changed while it was being packed"),
        ("a", None, "a: No such file"),
    ],
)
def test_source_that_changed(
    plan: ShardPlan, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        write_shard(plan, tmp_path / "x", lambda size: True)


def test_stop(plan: ShardPlan, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        write_shard(plan, tmp_path / "x", lambda size: size != 6)


@pytest.mark.parametrize("size", [IMAGE_LIMIT + 1, 3 << 30])
def test_image_that_no_record_holds_is_named(plan: ShardPlan, tmp_path: Path, size: int) -> None:
    with (tmp_path / "b").open("wb") as file:
        file.truncate(size)  # without blocks on disk
    large = plan.images[1]._replace(size=size)
    plan = replace(plan, images=[plan.images[0], large, *plan.images[2:]])
    result = write_shard(plan, tmp_path / "x", lambda size: True)
    assert result.faults == [(large, f"{size} bytes are too many, a record holds {IMAGE_LIMIT}")]
    assert len(result.offsets) == 3
