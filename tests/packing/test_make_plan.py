"""A plan: ids, labels, splits and shards of what the sources list, in any order."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.options import SplitOptions
from mpl_fast.packing.plan import make_plan as plan_module
from mpl_fast.packing.plan.choose_labeled import choose_labeled
from mpl_fast.packing.plan.layout import PlannedSplit, planned_splits, shard_groups
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.plan.table import RecordRow, open_table
from mpl_fast.packing.sources.source import Image, Source
from tests.packing.packs import KEEP, ROOT, Planned, image, images_of, plan_of, source_of

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


def source(
    counts: dict[str, int], spec: str = "held", order: tuple[str, ...] | None = None
) -> Source:
    return source_of(images_of(counts), spec=spec, order=order)


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


def test_number_of_shards(tmp_path: Path) -> None:
    # More shards than images: none is empty, as a reader refuses an empty file.
    plan = planned(tmp_path, replace(SEPARATE, shards=100), val=VAL)
    counts = Counter(shard.prefix for shard in plan.shards)
    assert counts == {"train_label": 4, "train_unlabel": 20, "val": 3}
    assert {shard.records for shard in plan.shards} == {1}
    by_size = replace(HOW, shards=None)
    for size, count in ((1, 20), (10, 20), (70, 3), (199, 2), (200, 1), (1 << 30, 1)):
        plan = planned(tmp_path, replace(by_size, shard_size=size))
        assert len(plan.shards) == count
        assert sum(shard.bytes for shard in plan.shards) == 200
    train = images_of({"ant": 3, "bee": 4}, 0)
    for how in (by_size, HOW):
        for sizes in ([0] * 7, [0, 0, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0]):  # empty files
            some = [one._replace(size=size) for one, size in zip(train, sizes, strict=True)]
            plan = planned(tmp_path, how, some)
            assert len(plan.shards) == (how.shards or 1)
            assert sum(shard.records for shard in plan.shards) == 7


def test_order(tmp_path: Path) -> None:
    listed = planned(tmp_path, replace(HOW, order="list"), val=VAL)
    val = ["ant/0.jpg", "bee/0.jpg", "bee/1.jpg"]
    assert listed.keys == [*sorted(one.path for one in TRAIN), *val]
    shuffled = planned(tmp_path, val=VAL)
    assert sorted(shuffled.keys[:20]) == sorted(listed.keys[:20]) != shuffled.keys[:20]
    assert planned(tmp_path, replace(HOW, shuffle_seed=1)).keys != shuffled.keys[:20]
    for seed in range(3):  # the order in which a source lists does not matter
        mixed = random.Random(seed).sample(TRAIN, len(TRAIN))
        assert vars(planned(tmp_path, train=mixed, val=VAL[::-1])) == vars(shuffled)


def test_labels(tmp_path: Path) -> None:
    by_name = planned(tmp_path, train=images_of({"n10": 2, "Bee": 2, "n9": 2, "ant": 2}))
    assert by_name.classes == ["Bee", "ant", "n10", "n9"]
    assert by_name.labels()["n10/0.jpg"] == 2
    in_order = source({"ant": 3, "bee": 3}, order=("bee", "2nd", "ant"))
    plan = plan_of(tmp_path / "plan", in_order, HOW)
    assert plan.classes == ["bee", "2nd", "ant"]
    labels = {f"ant/{number}.jpg": 2 for number in range(3)}
    assert plan.labels() == labels | {f"bee/{number}.jpg": 0 for number in range(3)}


@pytest.mark.parametrize("order", [("ant",), None])
@pytest.mark.parametrize("step", [1, -1])
def test_labels_of_two_sources(tmp_path: Path, order: tuple[str, ...] | None, step: int) -> None:
    both = [source({"ant": 3}, "a", order), source({"bee": 3}, "b", ("ant", "bee"))]
    assert plan_of(tmp_path / "plan", both[::step], HOW).classes == ["ant", "bee"]


@pytest.mark.parametrize(
    ("train", "val", "labels"),
    [
        ("ant bee cat", "0 2", {"0/0.jpg": 0, "2/0.jpg": 2}),  # a list without class names
        ("0 1 2 3", "0 1 2", {"0/0.jpg": 0, "1/0.jpg": 1, "2/0.jpg": 2}),  # numbers as names
    ],
)
def test_validation_labels_by_number(
    tmp_path: Path, train: str, val: str, labels: dict[str, int]
) -> None:
    held = source(dict.fromkeys(val.split(), 1), order=("0", "1", "2"))
    plan = plan_of(tmp_path / "plan", source(dict.fromkeys(train.split(), 3)), HOW, held)
    assert {row.path: row.label for row in plan.of("val")} == labels
    assert plan.classes == train.split()


def broken(source: Source) -> list[Image]:
    raise DataError("broken")


TRAIN_A = source_of(TRAIN, spec="a")
THREE = source({"ant": 3, "bee": 3, "cat": 3})
UNKNOWN = "classes are not in the training source"
NUMBERED = source({"bee": 3}, "b", ("ant", "bee"))


def refusal(
    tmp_path: Path,
    train: list[Source],
    val: Source | None = None,
    how: SplitOptions = HOW,
    error: type[Exception] = DataError,
) -> str:
    with pytest.raises(error) as caught:
        plan_of(tmp_path / "plan", train, how, val)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("plan*")) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([Source("x", "folder", Path("/x"), 0, 0, broken)], None, "broken"),  # type: ignore[arg-type]
        (
            [NUMBERED, source({"ant": 3}, "a", ("bee", "ant"))],
            None,
            "a: its labels mean other classes than another source's",
        ),
        (
            [NUMBERED, source({"cat": 1}, "c")],
            None,
            "b + c: 1 classes are not in the list that numbers the classes: cat",
        ),
        ([TRAIN_A], source({"ant": 1, "cat": 1}), f"held: 1 {UNKNOWN}: cat"),
        # A folder "0" is a name, not a number.
        ([THREE], source({"0": 1, "1": 1}), f"held: 2 {UNKNOWN}: 0, 1"),
        ([THREE], source({"0": 1, "1": 1}, order=("1", "0")), f"held: 2 {UNKNOWN}: 0, 1"),
        # A list with more labels than classes.
        ([THREE], source({"0": 1, "3": 1}, order=tuple("0123")), f"held: 2 {UNKNOWN}: 0, 3"),
        (  # the name 2 or the label 2?
            [source({"0": 3, "1": 3, "10": 3, "2": 3})],
            source({"0": 1, "1": 1, "2": 1}, order=("0", "1", "2")),
            "held: its labels are numbers, and so are the names of the training classes, in "
            "another order (class 2 has label 3); give it class folders or --val-labels",
        ),
        (
            [TRAIN_A, source({"bee": 1, "cat": 1}, "b")],
            None,
            "a + b: 1 names occur more than once as class/name: bee/0.jpg; does it hold several "
            "splits? Then name one folder of it",
        ),
    ],
)
def test_refused_sources(
    tmp_path: Path, train: list[Source], val: Source | None, message: str
) -> None:
    assert refusal(tmp_path, train, val) == message


def test_names_that_occur_twice(tmp_path: Path) -> None:
    message = refusal(tmp_path, [TRAIN_A, source_of(TRAIN, spec="b")])
    assert "a + b: 20 names" in message
    assert "and 10 more; does it" in message
    twice = source_of([*VAL, VAL[0]], spec="held")
    assert "held: 1 names occur" in refusal(tmp_path, [TRAIN_A], twice)
    # One name in training and in validation is no fault, nor is one in two classes.
    planned(tmp_path, val=TRAIN)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_refused_draws(tmp_path: Path, layout: str) -> None:
    how = replace(HOW, labeled="100%", layout=layout)
    assert refusal(tmp_path, [TRAIN_A], how=replace(how, unlabeled="rest")) == (
        "--unlabeled rest: no image is left, all are labeled; use --unlabeled all"
    )
    few = refusal(tmp_path, [TRAIN_A], how=replace(how, labeled="1"), error=ConfigError)
    assert "--labeled 1: 1 labeled images for 2 classes" in few
    plan_of(tmp_path / "plan", TRAIN_A, how)


def test_more_records_than_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "ID_LIMIT", 22)
    planned(tmp_path)
    (tmp_path / "plan").unlink()
    assert refusal(tmp_path, [TRAIN_A], source_of(VAL)) == (
        "23 records and more: the format has 22 ids; pack in parts"
    )


def test_warnings(tmp_path: Path) -> None:
    def with_warning(spec: str, images: list[Image]) -> Source:
        def listed(source: Source) -> list[Image]:
            source.warnings.append(f"{spec}: odd")
            return images

        return Source(spec, "folder", Path("/x"), 0, 0, listed)  # type: ignore[arg-type]

    both = [with_warning("a", TRAIN)], with_warning("v", VAL)
    assert make_plan(tmp_path / "plan", *both, HOW, KEEP, {}) == ["a: odd", "v: odd"]
    val = source({"bee": 2})
    val.warnings.append("held: of an earlier listing, which images() clears")
    warnings = make_plan(tmp_path / "plan", [TRAIN_A], val, HOW, KEEP, {})
    assert warnings == ["held: has no image of 1 of the classes"]


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
def test_drawn_images_are_labeled(tmp_path: Path, how: str, balance: str) -> None:
    train = images_of({"ant": 20, "bee": 10})
    if how == "list":
        (tmp_path / "names.txt").write_text("ant/3.jpg\nbee/0.jpg\nbee/7.jpg\n")
        how = str(tmp_path / "names.txt")
    names = ((at, one.class_name, one.name) for at, one in enumerate(train))
    drawn = choose_labeled(names, how, seed=5, balance=balance)
    split = replace(HOW, labeled=how, balance=balance, split_seed=5)
    labeled = {row.path for row in planned(tmp_path, split, train).rows if row.labeled}
    assert labeled == {train[at].path for at in drawn}
    assert len(labeled) == len(drawn) > 2


def test_planned_splits_and_shard_groups() -> None:
    for layout in ("shared", "separate"):
        for unlabeled in ("all", "rest"):
            listed = planned_splits(layout, unlabeled, val=True)
            prefixes = {piece.prefix for piece in shard_groups(layout, unlabeled, val=True)}
            assert {split.prefix for split in listed} == prefixes
            assert planned_splits(layout, unlabeled, val=False) == listed[:-1]
            assert [split.name for split in listed[-3:]] == ["labeled", "unlabeled", "val"]
            assert listed[-1].stem == listed[-1].prefix == "val"
    rows = [RecordRow(0, 0, labeled, "0.jpg", 0, "ant/0.jpg", -1, 10, 7) for labeled in (0, 1)]
    _, labeled, rest, _ = planned_splits("shared", "rest", val=True)
    assert [labeled.lists(row) for row in rows] == [False, True]
    assert [rest.lists(row) for row in rows] == [True, False]
    every = PlannedSplit("unlabeled", "train_unlabel", "train", None)
    assert planned_splits("shared", "all", val=True)[2] == every
    assert every.lists(rows[1])


def test_time_stamps_mark_shards(tmp_path: Path) -> None:
    """A touched archive marks all its shards, a touched file only the shard that holds it."""
    images = [one._replace(start=512 * at, stamp=0) for at, one in enumerate(TRAIN)]
    first, again, later = (
        plan_of(tmp_path / "plan", source_of(images, stamp=stamp), HOW).shards
        for stamp in (5, 5, 6)
    )
    assert first == again
    assert [shard.content for shard in later] == [shard.content for shard in first]
    assert all(a.stamps != b.stamps for a, b in zip(first, later, strict=True))
    before = planned(tmp_path)
    after = planned(tmp_path, train=[TRAIN[0]._replace(stamp=8), *TRAIN[1:]])
    row = next(row for row in before.rows if row.path == TRAIN[0].path)
    for old, new in zip(before.shards, after.shards, strict=True):
        holds = old.first_id <= row.id < old.first_id + old.records
        assert (old.stamps != new.stamps) == holds
        assert old.content == new.content


def test_names_and_folders_of_any_bytes(tmp_path: Path) -> None:
    odd = "\udcff o'n;e\"%?#"
    train = [*images_of({f"ant{odd}": 2, "bee": 2}), image("bee", f"{odd}.jpg")]
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


# Prints the peak memory in kB after the plan of few images and after that of many. Not ru_maxrss:
# a child starts with that of its parent.
MEASURE = """
import re, sys
from pathlib import Path
from mpl_fast.packing.options import ImageOptions, SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.sources.source import Image, Source

def images(source):
    for number in range(count):
        name = f"n{number % 1000:08}"
        file = f"{name}_{number}.JPEG"
        yield Image(name, file, f"{name}/{file}", -1, 110_000 + number, 1_700_000_000_000_000_000)

for count in (2_000, 100_000):
    source = Source("x", "folder", Path("/x"), 0, 0, images)
    how = SplitOptions(labeled="1000", shards=8)
    make_plan(Path(sys.argv[1]), [source], None, how, ImageOptions(), {})
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "plan")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    # The images alone would take 35 MB and more; the draw needs some 10.
    assert many - few < 25_000, (few, many)
