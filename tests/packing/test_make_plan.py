"""A plan: ids, labels, splits and shards of what the sources list, in any order."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mpl_fast.errors import ConfigError, DataError, UserError
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.plan import make_plan as plan_module
from mpl_fast.packing.plan.choose_labeled import choose_labeled
from mpl_fast.packing.plan.layout import planned_splits, shard_groups
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.plan.table import RecordRow, open_table
from mpl_fast.packing.sources.source import Image, Source
from tests.packing.made_sources import MadeSource, image, images_of, numbered_source, plan_of
from tests.packing.packs import ROOT, Planned, refuse, run
from tests.packing.test_choose_labeled import rows_of

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
    held = None if val is None else MadeSource(val, "held")
    return plan_of(tmp_path / "plan", MadeSource(train), how, held)


def source(classes: str, spec: str = "held", order: str | None = None) -> Source:
    """Return a source of three images of each class; order as in MadeSource."""
    images = images_of(dict.fromkeys(classes.split(), 3))
    return MadeSource(images, spec, order=None if order is None else order.split())


def test_shared_layout(tmp_path: Path) -> None:
    plan = planned(tmp_path, val=VAL)
    assert [(shard.file, shard.first_id, shard.records) for shard in plan.shards] == [
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
    assert [(shard.file, shard.first_id, shard.records) for shard in plan.shards] == [
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
    parts = [MadeSource(TRAIN[::2], "a"), MadeSource(TRAIN[1::2], "b")]  # nor how it is divided
    plan = plan_of(tmp_path / "plan", parts, HOW, MadeSource(VAL, "v"))
    assert plan.keys == shuffled.keys
    assert [row.labeled for row in plan.rows] == [row.labeled for row in shuffled.rows]
    assert {row.source for row in plan.of("val")} == {2}
    with open_table(tmp_path / "plan") as table:
        specs = [(source.number, source.spec) for source in table.sources()]
    assert specs == [(0, "a"), (1, "b"), (2, "v")]


@pytest.mark.parametrize(
    ("train", "classes"),
    [
        ([source("n10 Bee n9 ant")], "Bee ant n10 n9"),
        ([source("ant bee", order="bee 2nd ant")], "bee 2nd ant"),
        ([source("ant", "a", "ant"), source("bee", "b", "ant bee")], "ant bee"),
        ([source("bee", "b", "ant bee"), source("ant", "a", "ant")], "ant bee"),
        ([source("ant", "a"), source("bee", "b", "ant bee")], "ant bee"),
        ([source("bee", "b", "ant bee"), source("ant", "a")], "ant bee"),
    ],
)
def test_labels(tmp_path: Path, train: list[Source], classes: str) -> None:
    plan = plan_of(tmp_path / "plan", train, HOW)
    assert plan.classes == classes.split()
    for key, label in plan.labels().items():
        assert key.startswith(f"{plan.classes[label]}/")
    assert len(plan.labels()) == sum(len(list(one.images())) for one in train)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("ant bee cat", "0 2"),  # a list without class names
        ("0 1 2 3", "0 1 2"),  # numbers as names
    ],
)
def test_validation_labels_by_number(tmp_path: Path, train: str, val: str) -> None:
    plan = plan_of(tmp_path / "plan", source(train, "train"), HOW, source(val, order="0 1 2"))
    labels = {row.path: row.label for row in plan.of("val")}
    assert labels == {f"{name}/{at}.jpg": int(name) for name in val.split() for at in range(3)}
    assert plan.classes == train.split()


class Broken(MadeSource):
    def _list(self) -> Iterator[Image]:
        raise DataError("broken")


TRAIN_A = MadeSource(TRAIN, "a")
THREE = source("ant bee cat")
UNKNOWN = "classes are not in the training source"
NUMBERED = source("bee", "b", "ant bee")
TWICE, KEEP_ONE = "more than once in one source", "keep one image of each"


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([Broken([])], None, "broken"),
        (
            [NUMBERED, source("ant", "a", "bee ant")],
            None,
            "a: its labels mean other classes than another source's",
        ),
        (
            [NUMBERED, source("cat", "c")],
            None,
            "b + c: 1 class is not in the list that numbers the classes: cat",
        ),
        ([TRAIN_A], source("ant cat"), "held: 1 class is not in the training source: cat"),
        # A folder "0" is a name, not a number.
        ([THREE], source("0 1"), f"held: 2 {UNKNOWN}: 0, 1"),
        ([THREE], source("0 1", order="1 0"), f"held: 2 {UNKNOWN}: 0, 1"),
        # A list with more labels than classes.
        ([THREE], source("0 3", order="0 1 2 3"), f"held: 2 {UNKNOWN}: 0, 3"),
        (  # the name 2 or the label 2?
            [source("0 1 10 2")],
            source("0 1 2", order="0 1 2"),
            "held: its labels are numbers, and so are the names of the training classes, in "
            "another order (class 2 has label 3); give it class folders or --val-labels",
        ),
        (
            [TRAIN_A, MadeSource(TRAIN[:3], "a")],
            None,
            "a: 3 of its images are in a, too: give each image once",
        ),
        (
            [TRAIN_A, MadeSource(TRAIN * 2, "b")],
            None,
            f"b: 20 names occur {TWICE}: {', '.join(f'ant/{at}.jpg' for at in range(10))} "
            f"and 10 more; {KEEP_ONE}",
        ),
        (
            [TRAIN_A],
            MadeSource([*VAL, VAL[0]], "held"),
            f"held: 1 name occurs {TWICE}: bee/0.jpg; {KEEP_ONE}",
        ),
    ],
)
def test_refused_sources(
    tmp_path: Path, train: list[Source], val: Source | None, message: str
) -> None:
    assert refusal(tmp_path, DataError, train, val) == message


def refusal(
    tmp_path: Path,
    error: type[UserError],
    train: list[Source],
    val: Source | None = None,
    how: SplitOptions = HOW,
) -> str:
    with pytest.raises(error) as caught:
        plan_of(tmp_path / "plan", train, how, val)
    assert list(tmp_path.glob("plan*")) == []
    return str(caught.value)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_refused_draws(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = replace(HOW, labeled="100%", layout=layout)
    assert refusal(tmp_path, DataError, [TRAIN_A], how=replace(how, unlabeled="rest")) == (
        "--unlabeled rest: no image is left, all are labeled; use --unlabeled all"
    )
    few = refusal(tmp_path, ConfigError, [TRAIN_A], how=replace(how, labeled="1"))
    assert "--labeled 1: 1 labeled image for 2 classes" in few
    count = len(plan_of(tmp_path / "plan", TRAIN_A, how).rows)
    monkeypatch.setattr(plan_module, "ID_LIMIT", count)
    assert len(plan_of(tmp_path / "plan", TRAIN_A, how).rows) == count
    message = f"{count + 3} records and more: the format has {count} ids; pack in parts"
    assert refusal(tmp_path, DataError, [TRAIN_A], MadeSource(VAL), how) == message


def test_warnings(tmp_path: Path) -> None:
    options = PackOptions(src=("a",), out=tmp_path, split=HOW)
    train = [MadeSource(TRAIN, "a", warnings=["a: odd"])]
    val = MadeSource(VAL, "v", warnings=["v: odd"])
    absent = ["held: has no image of 1 of the 2 classes: ant"]
    for sources, held, expected in (
        (train, val, ["a: odd", "v: odd"]),
        ([TRAIN_A], source("bee"), absent),
        # One name in training and in validation is no fault, nor is one in two classes.
        ([TRAIN_A], MadeSource(TRAIN), []),
    ):
        warnings: list[str] = []
        make_plan(tmp_path / "plan", sources, held, options, warn=warnings.extend)
        assert warnings == expected


@pytest.mark.parametrize("kind", ["rec", "lst", "tar", "parquet"])
def test_labels_with_gaps(tmp_path: Path, kind: str) -> None:
    spec = numbered_source(tmp_path, kind, (1, 4))
    printed = run("pack", "--src", spec, "--labeled", 2, "--out", tmp_path / "out", "--dry-run")
    warning = f"{spec}: 3 of the labels 0 to 4 have no image: 0, 2, 3"
    assert f"make_rec: warning: {warning}\n" in printed.stderr
    arguments = ("--src", numbered_source(tmp_path, kind, (1, 1002)), "--out", tmp_path / "out")
    fault = refuse(*arguments, "--labeled", 2, status=4)
    assert fault == (
        f"make_rec: error: {spec}: its labels go up to 1002, but its 4 images have only 2 "
        "different labels: each number is a class, so renumber them 0 to 1"
    )


def test_gaps_that_are_not_refused(tmp_path: Path) -> None:
    """Up to a thousand, or ten an image of all sources; and classes with a name."""
    many = [str(label) for label in range(2000)]
    named = [f"class {label}" for label in range(2000)]
    options = PackOptions(src=("a",), out=tmp_path, split=replace(HOW, labeled="100%"))
    for order, count in ((many[:1002], 1), (many, 100), (named, 1)):
        train = [MadeSource(images_of({order[at]: count}), spec, order=order)
                 for at, spec in enumerate("ab")]  # fmt: skip
        warnings: list[str] = []
        make_plan(tmp_path / "plan", train, None, options, warn=warnings.extend)
        (warning,) = warnings
        assert f"a + b: {len(order) - 2} of the labels 0 to {len(order) - 1} have" in warning
    assert "have no image: 2 (class 2), 3 (class 3)," in warning
    with pytest.raises(DataError, match="its labels go up to 1999, but its 198 images have"):
        train = [MadeSource(images_of({many[at]: 99}), spec, order=many)
                 for at, spec in enumerate("ab")]  # fmt: skip
        make_plan(tmp_path / "plan", train, None, options, warn=lambda lines: None)


@pytest.mark.parametrize("how", ["4", "30%", "list"])
@pytest.mark.parametrize("balance", ["count", "proportional"])
def test_drawn_images_are_labeled(tmp_path: Path, how: str, balance: str) -> None:
    train = images_of({"ant": 20, "bee": 10})
    if how == "list":
        (tmp_path / "names.txt").write_text("ant/3.jpg\nbee/0.jpg\nbee/7.jpg\n")
        how = str(tmp_path / "names.txt")
    with rows_of([(at, one.class_name, one.name) for at, one in enumerate(train)]) as rows:
        drawn = set(choose_labeled(rows, how, seed=5, balance=balance))
    split = replace(HOW, labeled=how, balance=balance, split_seed=5)
    labeled = {row.path for row in planned(tmp_path, split, train).rows if row.labeled}
    assert labeled == {train[at].path for at in drawn}
    assert len(labeled) == len(drawn) > 2


def test_planned_splits_and_shard_groups() -> None:
    for layout in ("shared", "separate"):
        for unlabeled in ("all", "rest"):
            listed = planned_splits(layout, unlabeled, val=True)
            prefixes = shard_groups(layout, unlabeled, val=True).keys()
            assert {split.prefix for split in listed} == prefixes
            assert planned_splits(layout, unlabeled, val=False) == listed[:-1]
            assert [split.name for split in listed[-3:]] == ["labeled", "unlabeled", "val"]
            assert listed[-1].stem == listed[-1].prefix == "val"
    row = RecordRow(0, 0, 1, "0.jpg", 0, "ant/0.jpg", -1, 10, 7)
    for unlabeled, lists in (("all", [True, True, True]), ("rest", [True, True, False])):
        splits = planned_splits("shared", unlabeled, val=False)
        assert [split.lists(row) for split in splits] == lists
        assert [split.lists(row._replace(labeled=0)) for split in splits] == [True, False, True]


def test_time_stamps_mark_shards(tmp_path: Path) -> None:
    """A touched archive marks all its shards, a touched file only the shard that holds it."""
    images = [one._replace(start=512 * at, stamp=0) for at, one in enumerate(TRAIN)]
    first, again, later = (
        plan_of(tmp_path / "plan", MadeSource(images, stamp=stamp), HOW).shards
        for stamp in (5, 5, 6)
    )
    assert first == again
    assert [shard.content for shard in later] == [shard.content for shard in first]
    assert all(a.stamps != b.stamps for a, b in zip(first, later, strict=True))
    before = planned(tmp_path)
    after = planned(tmp_path, train=[TRAIN[0]._replace(stamp=8), *TRAIN[1:]])
    row = next(row for row in before.rows if row.path == TRAIN[0].path)
    for old, new in zip(before.shards, after.shards, strict=True):
        assert (old.stamps != new.stamps) == (old.ids[0] <= row.id <= old.ids[1])
        assert old.content == new.content
    with pytest.raises(DataError, match=r"somewhere: ant/0.jpg: its time is after 2262; touch it"):
        planned(tmp_path, train=[TRAIN[0]._replace(stamp=1 << 63)])


def test_names_and_folders_of_any_bytes(tmp_path: Path) -> None:
    odd = "\udcff o'n;e\"%?#"
    train = [*images_of({f"ant{odd}": 2, "bee": 2}), image("bee", f"{odd}.jpg")]
    folder = tmp_path / odd
    folder.mkdir()
    for name in ("plan", "plan.found"):
        (folder / name).write_bytes(b"left behind")
    plan = plan_of(folder / "plan", MadeSource(train, f"src{odd}"), replace(HOW, labeled="2"))
    assert sorted(plan.keys) == sorted(one.path for one in train)
    assert {row.path for row in plan.rows} == set(plan.keys)
    assert plan.classes == [f"ant{odd}", "bee"]
    assert [path.name for path in folder.iterdir()] == ["plan"]
    with open_table(folder / "plan") as table:
        assert table.sources()[0].spec == f"src{odd}"
        assert table.options()["src"] == [f"src{odd}"]


# Prints the peak memory in kB after the plan of few images and after that of many. Not ru_maxrss:
# a child starts with that of its parent.
MEASURE = """
import re, sys
from pathlib import Path
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.sources.source import Image
from tests.packing.made_sources import MadeSource

class Many(MadeSource):
    def _list(self):
        for number in range(count):
            name = f"n{number % 1000:08}"
            file = sys.argv[2].format(f"{name}_{number}")
            yield Image(name, file, f"{name}/{number}/{file}", -1, 110_000 + number, 1 << 60)

path = Path(sys.argv[1])
options = PackOptions(src=("x",), out=path, split=SplitOptions(labeled="1000", shards=8))
for count in (2_000, 100_000):
    make_plan(path, [Many([])], None, options, warn=lambda lines: None)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["{}.JPEG", "equal.JPEG"])
def test_memory_does_not_grow_with_the_images(tmp_path: Path, file: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "plan"), file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    # The images alone would take 35 MB and more; the draw needs some 10.
    assert many - few < 25_000, (few, many)
