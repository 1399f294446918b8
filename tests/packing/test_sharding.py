"""Shards of about equal size, none empty, and the digests that detect a change of a plan."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.sharding import ShardAssigner, ShardDigest, plan_digest, shard_file
from mpl_fast.packing.plan.table import RecordRow, open_table
from tests.packing.packs import KEEP, images_of, plan_of, source_of

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


CONTENT = digest_of(ROW).content("x")
STAMPS = digest_of(ROW).stamps()


@pytest.mark.parametrize(
    "row",
    [
        ROW._replace(id=4),
        ROW._replace(label=2),
        ROW._replace(name="b.jpg"),  # its suffix decides what it is converted to
        ROW._replace(size=11),
    ],
)
def test_rows_change_the_content_digest(row: RecordRow) -> None:
    assert digest_of(row).content("x") != CONTENT
    assert digest_of(row).stamps() == STAMPS


def test_places_and_times_change_the_stamps_digest() -> None:
    others = [
        digest_of(ROW._replace(path="bee/a.jpg")),
        digest_of(ROW._replace(start=512)),
        digest_of(ROW, stamp=8),
    ]
    assert len({STAMPS, *(digest.stamps() for digest in others)}) == 4
    # No .rec file contains which images are labeled.
    labeled = digest_of(ROW._replace(labeled=1))
    assert labeled.stamps() == STAMPS
    assert {digest.content("x") for digest in (*others, labeled)} == {CONTENT}


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
def test_options_change_the_content_digest(changed: dict[str, object]) -> None:
    options = replace(KEEP, **changed)  # type: ignore[arg-type]
    assert digest_of(ROW, options).content("x") != CONTENT


def test_file_and_skipping_in_the_content_digest() -> None:
    assert digest_of(ROW).content("other") != CONTENT
    assert digest_of(ROW, replace(KEEP, on_bad="skip")).content("x") == CONTENT


HOW = SplitOptions(labeled="4", shards=3)


def whole_digest(path: Path, how: SplitOptions, *, spec: str = "here", classes: str = "bee") -> str:
    plan_of(path / "plan", source_of(images_of({"ant": 10, classes: 10}), spec=spec), how)
    with open_table(path / "plan") as table:
        return plan_digest(table)


def test_plan_digest(tmp_path: Path) -> None:
    digest = whole_digest(tmp_path, HOW)
    assert whole_digest(tmp_path, HOW, spec="elsewhere") == digest
    assert whole_digest(tmp_path, replace(HOW, shards=None, shard_size=70)) == digest
    changed = [
        replace(HOW, labeled="6"),
        replace(HOW, split_seed=1),
        replace(HOW, unlabeled="rest"),
        replace(HOW, layout="separate"),
        replace(HOW, shards=2),
        replace(HOW, shuffle_seed=1),
        replace(HOW, order="list"),
    ]
    others = {whole_digest(tmp_path, how) for how in changed}
    others |= {digest, whole_digest(tmp_path, HOW, classes="cat")}
    assert len(others) == len(changed) + 2
