"""A pack is cut into shards of about equal size, none empty; a digest tells what became other."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.packing.made_packs import KEEP, images_of, plan_of, source_of

from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.sharding import ShardAssigner, ShardDigest, plan_digest, shard_file
from mpl_fast.packing.plan.table import RecordRow, open_table

ROW = RecordRow(3, 1, 0, "a.jpg", 0, "ant/a.jpg", -1, 10, 7)


def cut(sizes: list[int], shards: int) -> list[int]:
    """Return the shard of each record."""
    numbers = ShardAssigner(len(sizes), sum(sizes), shards)
    return [numbers.assign(size) for size in sizes]


def test_names() -> None:
    assert shard_file("train", 0, 1) == "train.rec"
    assert shard_file("train", 7, 12) == "train-00007-of-00012.rec"
    assert shard_file("val", 123456, 200000) == "val-123456-of-200000.rec"


@pytest.mark.parametrize(
    ("sizes", "shards", "expected"),
    [
        ([5] * 6, 3, [0, 0, 1, 1, 2, 2]),
        ([5] * 3, 3, [0, 1, 2]),
        ([1, 1, 1, 9], 2, [0, 0, 0, 1]),
        ([9, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([0, 0, 0], 2, [0, 0, 1]),
        ([0, 0, 10], 3, [0, 1, 2]),
        ([5, 5, 0], 2, [0, 1, 1]),
        ([1, 0, 0], 2, [0, 1, 1]),
    ],
)
def test_cut_by_hand(sizes: list[int], shards: int, expected: list[int]) -> None:
    assert cut(sizes, shards) == expected


_SIZES = st.lists(st.one_of(st.just(0), st.integers(0, 20), st.just(10**9)), min_size=1)


@given(_SIZES, st.data())
def test_no_shard_is_empty_or_left_out(sizes: list[int], data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(sizes)))
    numbers = cut(sizes, shards)
    assert numbers[0] == 0
    assert numbers[-1] == shards - 1
    steps = {later - number for number, later in itertools.pairwise(numbers)}
    assert steps <= {0, 1}


@given(st.lists(st.integers(1, 100), min_size=20), st.integers(1, 10))
def test_shards_differ_by_less_than_two_images(sizes: list[int], shards: int) -> None:
    shards = min(shards, sum(sizes) // max(sizes))  # no image is larger than a shard
    held = [0] * shards
    for number, size in zip(cut(sizes, shards), sizes, strict=True):
        held[number] += size
    assert all(abs(size - sum(sizes) / shards) <= max(sizes) for size in held)


def digest_of(row: RecordRow, image_options: ImageOptions = KEEP, stamp: int = 7) -> ShardDigest:
    digest = ShardDigest(image_options)
    digest.add(row, stamp)
    return digest


@pytest.mark.parametrize(
    "row",
    [
        ROW._replace(id=4),
        ROW._replace(label=2),
        ROW._replace(name="b.jpg"),  # its suffix decides what it is converted to
        ROW._replace(size=11),
    ],
)
def test_what_is_written_decides_the_content(row: RecordRow) -> None:
    assert digest_of(row).content("x") != digest_of(ROW).content("x")
    assert digest_of(row).stamps() == digest_of(ROW).stamps()


def test_where_and_when_decide_the_stamps() -> None:
    others = [
        digest_of(ROW._replace(path="bee/a.jpg")),
        digest_of(ROW._replace(start=512)),
        digest_of(ROW, stamp=8),
    ]
    assert len({digest.stamps() for digest in (digest_of(ROW), *others)}) == 4
    assert {digest.content("x") for digest in others} == {digest_of(ROW).content("x")}
    # Which of them are labeled is written in no .rec file.
    other = digest_of(ROW._replace(labeled=1))
    assert (other.content("x"), other.stamps()) == (
        digest_of(ROW).content("x"),
        digest_of(ROW).stamps(),
    )


def test_file_is_part_of_the_content() -> None:
    assert digest_of(ROW).content("train.rec") != digest_of(ROW).content("val.rec")


@pytest.mark.parametrize(
    "changed",
    [
        {"check": "decode"},
        {"on_bad": "convert"},
        {"short_side": 100},
        {"quality": 80},
        {"min_shrink": 1.5},
    ],
)
def test_treatment_decides_the_content(changed: dict[str, object]) -> None:
    other = digest_of(ROW, replace(KEEP, **changed))  # type: ignore[arg-type]
    assert other.content("x") != digest_of(ROW).content("x")


def test_leaving_bad_images_out_keeps_shards_without_any() -> None:
    other = digest_of(ROW, replace(KEEP, on_bad="skip"))
    assert other.content("x") == digest_of(ROW).content("x")


HOW = SplitOptions(labeled="4", shards=3)


def whole_digest(path: Path, how: SplitOptions, *, spec: str = "here", classes: str = "bee") -> str:
    plan_of(path / "plan", source_of(images_of({"ant": 10, classes: 10}), spec=spec), how)
    with open_table(path / "plan") as table:
        return plan_digest(table)


def test_plan_digest_tells_packs_apart(tmp_path: Path) -> None:
    digest = whole_digest(tmp_path, HOW)
    assert whole_digest(tmp_path, HOW, spec="elsewhere") == digest
    # The size of the shards was only a way to their number.
    assert whole_digest(tmp_path, replace(HOW, shards=None, shard_size=70)) == digest
    others = [
        whole_digest(tmp_path, HOW, classes="cat"),
        whole_digest(tmp_path, replace(HOW, labeled="6")),
        whole_digest(tmp_path, replace(HOW, split_seed=1)),
        whole_digest(tmp_path, replace(HOW, unlabeled="rest")),
        whole_digest(tmp_path, replace(HOW, layout="separate")),
        whole_digest(tmp_path, replace(HOW, shards=2)),
        whole_digest(tmp_path, replace(HOW, shuffle_seed=1)),
        whole_digest(tmp_path, replace(HOW, order="list")),
    ]
    assert len({digest, *others}) == 1 + len(others)
