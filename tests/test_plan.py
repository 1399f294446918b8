"""The plan decides ids, labels, shards and checks, and its digest tells one pack from another."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.plan import Division, Plan, make_plan
from mpl_fast.packing.sources import ImageFile, Place, Source


def source_of(counts: dict[str, int], path: str = "somewhere") -> Source:
    images = [
        ImageFile(name, f"{number}.jpg", path, 0, 10 + number)
        for name, count in counts.items()
        for number in range(count)
    ]
    return Source(Place(path, Path(path)), images, [], 0.0)


TRAIN = source_of({"ant": 10, "bee": 10})
HOW = Division(labeled="4", shards=3)


def plan_of(how: Division, train: Source = TRAIN, val: Source | None = None) -> Plan:
    return make_plan(train, val, how)


def test_ids_count_through_all_shards() -> None:
    plan = plan_of(HOW, val=source_of({"bee": 2}))
    rows = [(shard.file, shard.first_id, len(shard.images)) for shard in plan.shards]
    assert rows == [
        ("train_label-00000-of-00003.rec", 0, 1),
        ("train_label-00001-of-00003.rec", 1, 1),
        ("train_label-00002-of-00003.rec", 2, 2),
        ("train_unlabel-00000-of-00003.rec", 4, 6),
        ("train_unlabel-00001-of-00003.rec", 10, 7),
        ("train_unlabel-00002-of-00003.rec", 17, 7),
        # Two images make no third shard: a reader refuses an empty file.
        ("val-00000-of-00002.rec", 24, 1),
        ("val-00001-of-00002.rec", 25, 1),
    ]
    assert {row for split in plan.splits[2:] for row in split.rows} == {
        (1, "bee/0.jpg"),
        (1, "bee/1.jpg"),
    }


@pytest.mark.parametrize(("unlabeled", "labeled_check"), [("all", "none"), ("rest", "decode")])
def test_each_image_is_checked_once(unlabeled: str, labeled_check: str) -> None:
    labeled, rest = plan_of(replace(HOW, unlabeled=unlabeled)).splits
    assert {shard.check for shard in labeled.shards} == {labeled_check}
    assert {shard.check for shard in rest.shards} == {"decode"}


def test_digest_changes_with_what_is_packed_and_nothing_else() -> None:
    digest = plan_of(HOW).digest()
    assert digest == plan_of(HOW, source_of({"ant": 10, "bee": 10}, "elsewhere")).digest()
    others = [
        plan_of(replace(HOW, labeled="6")),
        plan_of(replace(HOW, unlabeled="rest")),
        plan_of(replace(HOW, split_seed=1)),
        plan_of(replace(HOW, shuffle_seed=1)),
        plan_of(replace(HOW, shards=2)),
        plan_of(replace(HOW, check="header")),
        plan_of(HOW, val=TRAIN),
        plan_of(HOW, source_of({"ant": 10, "cat": 10})),
        plan_of(HOW, replace(TRAIN, images=[TRAIN.images[0]._replace(size=1), *TRAIN.images[1:]])),
    ]
    assert len({digest, *(plan.digest() for plan in others)}) == 1 + len(others)


def test_unknown_class_is_named() -> None:
    with pytest.raises(DataError, match="1 classes are not in the training source: cat"):
        plan_of(HOW, val=source_of({"ant": 1, "cat": 1}))
