"""A plan decides ids, labels, splits and shards from what the sources list, in any order."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests.packing.made_packs import KEEP, ROOT, Planned, image, images_of, plan_of, source_of

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.options import SplitOptions
from mpl_fast.packing.plan import make_plan as plan_module
from mpl_fast.packing.plan.choose_labeled import choose_labeled
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits, shard_groups
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.plan.table import RecordRow, open_table
from mpl_fast.packing.sources.source import Image, Source

TRAIN = images_of({"ant": 10, "bee": 10})
VAL = images_of({"bee": 2, "ant": 1})
HOW = SplitOptions(labeled="4", shards=3)
SEPARATE = replace(HOW, layout="separate")


def planned(
    tmp_path: Path,
    how: SplitOptions = HOW,
    train: list[Image] = TRAIN,
    val: list[Image] | None = None,
) -> Planned:
    held = None if val is None else source_of(val, spec="held")
    return plan_of(tmp_path / "plan", source_of(train), how, held)


def shapes(plan: Planned) -> list[tuple[str, int, int]]:
    return [(shard.file, shard.first_id, shard.records) for shard in plan.shards]


def refusal(tmp_path: Path, *arguments: object, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        plan_of(tmp_path / "plan", *arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("plan*")) == []
    return str(caught.value)


def test_ids_count_through_all_shards_of_the_shared_layout(tmp_path: Path) -> None:
    plan = planned(tmp_path, val=VAL)
    assert shapes(plan) == [
        ("train-00000-of-00003.rec", 0, 7),
        ("train-00001-of-00003.rec", 7, 6),
        ("train-00002-of-00003.rec", 13, 7),
        ("val-00000-of-00003.rec", 20, 1),
        ("val-00001-of-00003.rec", 21, 1),
        ("val-00002-of-00003.rec", 22, 1),
    ]
    assert [shard.number for shard in plan.shards] == list(range(6))
    assert [row.id for row in plan.rows] == list(range(23))
    assert sorted(plan.keys[20:]) == ["ant/0.jpg", "bee/0.jpg", "bee/1.jpg"]
    assert [shard.bytes for shard in plan.shards] == [70, 60, 70, 10, 10, 10]


@pytest.mark.parametrize(("unlabeled", "count"), [("all", 20), ("rest", 16)])
def test_separate_layout(tmp_path: Path, unlabeled: str, count: int) -> None:
    plan = planned(tmp_path, replace(SEPARATE, unlabeled=unlabeled, shards=1), val=VAL)
    assert shapes(plan) == [
        ("train_label.rec", 0, 4),
        ("train_unlabel.rec", 4, count),
        ("val.rec", 4 + count, 3),
    ]
    labeled = {row.path for row in plan.of("train_label")}
    others = {row.path for row in plan.of("train_unlabel")}
    assert len(labeled) == 4
    assert all(row.labeled for row in plan.of("train_label"))
    assert others | labeled == {one.path for one in TRAIN}
    assert others & labeled == (labeled if unlabeled == "all" else set())
    assert not any(row.labeled for row in plan.of("val"))


def test_fewer_images_than_shards(tmp_path: Path) -> None:
    # A reader refuses an empty file.
    plan = planned(tmp_path, replace(SEPARATE, shards=100), val=VAL)
    counts = Counter(shard.prefix for shard in plan.shards)
    assert counts == {"train_label": 4, "train_unlabel": 20, "val": 3}
    assert {shard.records for shard in plan.shards} == {1}


def test_shard_size(tmp_path: Path) -> None:
    for size, count in ((1, 20), (10, 20), (70, 3), (199, 2), (200, 1), (1 << 30, 1)):
        plan = planned(tmp_path, replace(HOW, shards=None, shard_size=size))
        assert len(plan.shards) == count
        assert sum(shard.bytes for shard in plan.shards) == 200


def test_empty_files_are_planned_too(tmp_path: Path) -> None:
    train = images_of({"ant": 3, "bee": 4}, 0)
    for how in (replace(HOW, shards=None), HOW):
        for sizes in ([0] * 7, [0, 0, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0]):
            some = [one._replace(size=size) for one, size in zip(train, sizes, strict=True)]
            plan = planned(tmp_path, how, some)
            assert len(plan.shards) == (how.shards or 1)
            assert sum(shard.records for shard in plan.shards) == 7


def test_sources_may_list_in_any_order(tmp_path: Path) -> None:
    first = planned(tmp_path, val=VAL)
    for seed in range(3):
        mixed = random.Random(seed).sample(TRAIN, len(TRAIN))
        again = planned(tmp_path, train=mixed, val=VAL[::-1])
        assert (again.rows, again.shards, again.classes) == (
            first.rows,
            first.shards,
            first.classes,
        )


def test_order(tmp_path: Path) -> None:
    listed = planned(tmp_path, replace(HOW, order="list"), val=VAL)
    val = ["ant/0.jpg", "bee/0.jpg", "bee/1.jpg"]
    assert listed.keys == [*sorted(one.path for one in TRAIN), *val]
    shuffled = planned(tmp_path)
    assert sorted(shuffled.keys) == sorted(listed.keys[:20]) != shuffled.keys
    assert planned(tmp_path, replace(HOW, shuffle_seed=1)).keys != shuffled.keys
    # The order of the rest stays when some images go.
    fewer = planned(tmp_path, train=TRAIN[:15])
    left = {one.path for one in TRAIN[:15]}
    assert fewer.keys == [key for key in shuffled.keys if key in left]


def test_shuffled_order_mixes_the_classes(tmp_path: Path) -> None:
    plan = planned(tmp_path, train=images_of({"ant": 200, "bee": 200}))
    halves = [Counter(row.label for row in part) for part in (plan.rows[:200], plan.rows[200:])]
    assert all(70 < half[0] < 130 for half in halves)


def test_labels_follow_the_sorted_names(tmp_path: Path) -> None:
    plan = planned(tmp_path, train=images_of({"n10": 2, "Bee": 2, "n9": 2, "ant": 2}))
    assert plan.classes == ["Bee", "ant", "n10", "n9"]
    assert plan.labels()["n10/0.jpg"] == 2


def test_labels_of_a_list_stay(tmp_path: Path) -> None:
    source = source_of(images_of({"ant": 3, "bee": 3}), order=("bee", "2nd", "ant"))
    plan = plan_of(tmp_path / "plan", source, HOW)
    assert plan.classes == ["bee", "2nd", "ant"]
    assert plan.labels() == {
        **{f"ant/{number}.jpg": 2 for number in range(3)},
        **{f"bee/{number}.jpg": 0 for number in range(3)},
    }


def test_labels_of_two_sources(tmp_path: Path) -> None:
    ants, bees = images_of({"ant": 3}), images_of({"bee": 3})
    longer = source_of(bees, spec="b", order=("ant", "bee"))
    for other in (source_of(ants, spec="a", order=("ant",)), source_of(ants, spec="a")):
        for both in ([other, longer], [longer, other]):
            assert plan_of(tmp_path / "plan", both, HOW).classes == ["ant", "bee"]
    against = source_of(ants, spec="a", order=("bee", "ant"))
    assert refusal(tmp_path, [longer, against], HOW) == (
        "a: its labels mean other classes than another source's"
    )
    unknown = source_of(images_of({"cat": 1}), spec="c")
    assert refusal(tmp_path, [longer, unknown], HOW) == (
        "b + c: 1 classes are not in the list that numbers the classes: cat"
    )


def numbered(classes: list[str], order: tuple[str, ...] | None) -> Source:
    return source_of(images_of(dict.fromkeys(classes, 1)), spec="held", order=order)


def test_validation_list_that_knows_classes_by_number(tmp_path: Path) -> None:
    train = source_of(images_of({"ant": 3, "bee": 3, "cat": 3}))
    plan = plan_of(tmp_path / "plan", train, HOW, numbered(["0", "2"], ("0", "1", "2")))
    assert [(row.label, row.path) for row in sorted(plan.of("val"), key=lambda row: row.label)] == [
        (0, "0/0.jpg"),
        (2, "2/0.jpg"),
    ]
    assert plan.classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (["0", "3"], ("0", "1", "2", "3")),  # more labels than classes
        (["0", "1"], None),  # a folder "0" is a name, not a number
        (["1", "0"], ("1", "0")),
    ],
)
def test_numbers_that_are_no_labels(
    tmp_path: Path, classes: list[str], order: tuple[str, ...] | None
) -> None:
    train = source_of(images_of({"ant": 3, "bee": 3, "cat": 3}))
    assert refusal(tmp_path, train, HOW, numbered(classes, order)) == (
        f"held: 2 classes are not in the training source: {', '.join(sorted(classes))}"
    )


def test_classes_that_are_called_numbers(tmp_path: Path) -> None:
    val = numbered(["0", "1", "2"], ("0", "1", "2"))
    train = source_of(images_of({"0": 3, "1": 3, "2": 3, "3": 3}))
    plan = plan_of(tmp_path / "plan", train, HOW, val)
    assert {row.path: row.label for row in plan.of("val")} == {
        "0/0.jpg": 0,
        "1/0.jpg": 1,
        "2/0.jpg": 2,
    }
    # The name 2 or the label 2? Nobody can tell.
    train = source_of(images_of({"0": 3, "1": 3, "10": 3, "2": 3}))
    assert refusal(tmp_path, train, HOW, val) == (
        "held: its labels are numbers, and so are the names of the training classes, in another "
        "order (class 2 has label 3); give it class folders or --val-labels"
    )


def test_unknown_class_is_named(tmp_path: Path) -> None:
    train, val = source_of(TRAIN), source_of(images_of({"ant": 1, "cat": 1}), spec="held")
    assert refusal(tmp_path, train, HOW, val) == (
        "held: 1 classes are not in the training source: cat"
    )


def test_class_without_validation_images_is_a_warning(tmp_path: Path) -> None:
    val = source_of(images_of({"bee": 2}), spec="held")
    val.warnings.append("held: something of its own")
    path = tmp_path / "plan"
    # images() clears what was told before
    told = make_plan(path, [source_of(TRAIN)], val, HOW, KEEP, {})
    assert told == ["held: has no image of 1 of the classes"]


def test_warnings_of_all_sources_are_told(tmp_path: Path) -> None:
    def source(spec: str, images: list[Image]) -> Source:
        def listed(source: Source) -> list[Image]:
            source.warnings.append(f"{spec}: odd")
            return images

        return Source(spec, "folder", Path("/x"), 0, 0, listed)  # type: ignore[arg-type]

    told = make_plan(tmp_path / "plan", [source("a", TRAIN)], source("v", VAL), HOW, KEEP, {})
    assert told == ["a: odd", "v: odd"]


def test_names_twice_over_two_sources(tmp_path: Path) -> None:
    both = [source_of(TRAIN, spec="a"), source_of(images_of({"bee": 1, "cat": 1}), spec="b")]
    assert refusal(tmp_path, both, HOW) == (
        "a + b: 1 names occur more than once as class/name: bee/0.jpg; does it hold several "
        "splits? Then name one folder of it"
    )
    again = [source_of(TRAIN, spec="a"), source_of(TRAIN, spec="b")]
    assert "a + b: 20 names" in refusal(tmp_path, again, HOW)
    assert "and 10 more; does it" in refusal(tmp_path, again, HOW)
    twice = source_of([*VAL, VAL[0]], spec="held")
    assert "held: 1 names occur" in refusal(tmp_path, source_of(TRAIN), HOW, twice)
    # One name in training and in validation is no fault, nor is one in two classes.
    planned(tmp_path, val=TRAIN)


def test_sources_are_joined(tmp_path: Path) -> None:
    parts = [source_of(TRAIN[::2], spec="a"), source_of(TRAIN[1::2], spec="b")]
    plan = plan_of(tmp_path / "plan", parts, HOW, source_of(VAL, spec="v"))
    whole = planned(tmp_path, val=VAL)
    assert plan.keys == whole.keys
    assert [row.labeled for row in plan.rows] == [row.labeled for row in whole.rows]
    assert {row.source for row in plan.of("val")} == {2}
    with open_table(tmp_path / "plan") as table:
        specs = [(source.number, source.spec) for source in table.sources()]
    assert specs == [(0, "somewhere"), (1, "held")]


@pytest.mark.parametrize("how", ["4", "30%", "list"])
@pytest.mark.parametrize("balance", ["count", "proportional"])
def test_labeled_ones_are_those_of_the_draw(tmp_path: Path, how: str, balance: str) -> None:
    train = images_of({"ant": 20, "bee": 10})
    if how == "list":
        (tmp_path / "names.txt").write_text("ant/3.jpg\nbee/0.jpg\nbee/7.jpg\n")
        how = str(tmp_path / "names.txt")
    drawn = choose_labeled(
        ((at, one.class_name, one.name) for at, one in enumerate(train)),
        how,
        seed=5,
        balance=balance,
    )
    division = replace(HOW, labeled=how, balance=balance, split_seed=5)
    plan = planned(tmp_path, division, train)
    labeled = {row.path for row in plan.rows if row.labeled}
    assert labeled == {train[at].path for at in drawn}
    assert len(labeled) == len(drawn) > 2


def test_bad_draw(tmp_path: Path) -> None:
    few = replace(HOW, labeled="1")
    assert "--labeled 1: 1 labeled images for 2 classes" in refusal(
        tmp_path, source_of(TRAIN), few, error=ConfigError
    )


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_nothing_is_left_unlabeled(tmp_path: Path, layout: str) -> None:
    how = replace(HOW, labeled="100%", layout=layout)
    assert refusal(tmp_path, source_of(TRAIN), replace(how, unlabeled="rest")) == (
        "--unlabeled rest: no image is left, all are labeled; use --unlabeled all"
    )
    plan_of(tmp_path / "plan", source_of(TRAIN), how)


def test_splits_and_pieces() -> None:
    row = planned_row(labeled=0)
    for layout in ("shared", "separate"):
        for unlabeled in ("all", "rest"):
            listed = planned_splits(layout, unlabeled, val=True)
            prefixes = {piece.prefix for piece in shard_groups(layout, unlabeled, val=True)}
            assert {split.prefix for split in listed} == prefixes
            assert planned_splits(layout, unlabeled, val=False) == listed[:-1]
            assert [split.name for split in listed[-3:]] == ["labeled", "unlabeled", "val"]
            assert listed[-1].stem == listed[-1].prefix == "val"
    _, labeled, rest, _ = planned_splits("shared", "rest", val=True)
    assert (labeled.lists(row), rest.lists(row)) == (False, True)
    row = planned_row(labeled=1)
    assert (labeled.lists(row), rest.lists(row)) == (True, False)
    every = PlannedSplit("unlabeled", "train_unlabel", "train", None)
    assert planned_splits("shared", "all", val=True)[2] == every
    assert every.lists(row)


def planned_row(labeled: int) -> RecordRow:
    return RecordRow(0, 0, labeled, "0.jpg", 0, "ant/0.jpg", -1, 10, 7)


def test_stamp_of_a_file_with_many_images_counts(tmp_path: Path) -> None:
    images = [one._replace(start=512 * at, stamp=0) for at, one in enumerate(TRAIN)]
    first, again, later = (
        plan_of(tmp_path / "plan", source_of(images, stamp=stamp), HOW).shards
        for stamp in (5, 5, 6)
    )
    assert first == again
    assert [shard.content for shard in later] == [shard.content for shard in first]
    assert all(a.stamps != b.stamps for a, b in zip(first, later, strict=True))


def test_one_touched_image_marks_its_shard_only(tmp_path: Path) -> None:
    before = planned(tmp_path)
    touched = [TRAIN[0]._replace(stamp=8), *TRAIN[1:]]
    after = planned(tmp_path, train=touched)
    row = next(row for row in before.rows if row.path == TRAIN[0].path)
    for old, new in zip(before.shards, after.shards, strict=True):
        holds = old.first_id <= row.id < old.first_id + old.records
        assert (old.stamps != new.stamps) == holds
        assert old.content == new.content


def test_more_records_than_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "ID_LIMIT", 22)
    planned(tmp_path)
    (tmp_path / "plan").unlink()
    assert refusal(tmp_path, source_of(TRAIN), HOW, source_of(VAL)) == (
        "23 records and more: the format has 22 ids; pack in parts"
    )


def test_names_and_folders_of_any_bytes(tmp_path: Path) -> None:
    odd = "\udcff o'n;e\"%?#"
    train = images_of({f"ant{odd}": 2, "bee": 2})
    train += [image("bee", f"{odd}.jpg")]
    folder = tmp_path / odd
    folder.mkdir()
    plan = plan_of(folder / "plan", source_of(train, spec=f"src{odd}"), replace(HOW, labeled="2"))
    assert sorted(plan.keys) == sorted(one.path for one in train)
    assert {row.path for row in plan.rows} == set(plan.keys)
    assert plan.classes == [f"ant{odd}", "bee"]
    with open_table(folder / "plan") as table:
        assert table.sources()[0].spec == f"src{odd}"
        assert table.options()["src"] == [f"src{odd}"]


def test_plan_replaces_an_older_one_and_leaves_no_scratch(tmp_path: Path) -> None:
    for name in ("plan", "plan.found"):
        (tmp_path / name).write_bytes(b"left behind")
    assert len(planned(tmp_path).rows) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_source_that_fails_leaves_no_plan(tmp_path: Path) -> None:
    def broken(source: Source) -> list[Image]:
        raise DataError("broken")

    source = Source("x", "folder", Path("/x"), 0, 0, broken)  # type: ignore[arg-type]
    assert refusal(tmp_path, source, HOW) == "broken"


# Prints the peak memory in MB before and after a plan of so many images.
MEASURE = """
import json, resource, sys
from pathlib import Path
from mpl_fast.packing.options import SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.sources.source import Image, Source
from mpl_fast.packing.options import ImageOptions

def images(source):
    for number in range(count):
        name = f"n{number % 1000:08}"
        file = f"{name}_{number}.JPEG"
        yield Image(name, file, f"{name}/{file}", -1, 110_000 + number, 1_700_000_000_000_000_000)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def plan(some):
    global count
    count = some
    source = Source("x", "folder", Path("/x"), 0, 0, images)
    division = SplitOptions(labeled="1000", shards=8)
    make_plan(Path(sys.argv[1]), [source], None, division, ImageOptions(), {})
    return peak()

print(json.dumps([plan(2_000), plan(100_000)]))
"""


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "plan")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    # A tuple of each image alone would be 40 MB and more; the draw needs some 10.
    assert many - few < 30, (few, many)
