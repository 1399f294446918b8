"""Labels of classes: sorted by name or naturally, by number, by a file; and the titles in it."""

import json
import random
from pathlib import Path

import pytest

from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.options import PackOptions
from mpl_fast.packing.plan.label_classes import (
    LabeledClasses,
    label_classes,
    natural_key,
    read_classes,
)
from mpl_fast.packing.sources.source import Source
from tests.packing.made_sources import MadeSource, images_of, numbered_source
from tests.packing.packs import (
    Done,
    error_of,
    jpeg,
    make_tree,
    manifest_of,
    names,
    read_split,
    refuse,
    run,
    verified,
)

WORDS = "ant\tAmeise, Emse\nbee\ncat\tKatze\n"


def source(classes: str, spec: str = "src", order: str | None = None) -> Source:
    """Return a source of two images of each class; order as in MadeSource."""
    images = images_of(dict.fromkeys(classes.split(), 2))
    return MadeSource(images, spec, order=None if order is None else order.split())


def labeled(
    train: Source, val: Source | None = None, *, file: Path | None = None, order: str = "name"
) -> LabeledClasses:
    """Return the labels of two listed sources."""
    trained, held = (
        {image.class_name for image in one.images()} if one else set() for one in (train, val)
    )
    options = PackOptions(src=("src",), out=Path("OUT"), classes=file, class_order=order)
    return label_classes([train], val, trained, held, 2 * len(trained), options)


# Sorted names.


def test_natural_order_is_timms() -> None:
    from timm.utils.misc import natural_key as timms_key

    draw = random.Random(0)
    for _ in range(2000):
        name = "".join(draw.choices("aBé_ .-0129\u0661", k=draw.randrange(12)))
        assert natural_key(name) == timms_key(name)  # type: ignore[no-untyped-call]


def test_both_orders_are_those_of_the_libraries(tmp_path: Path) -> None:
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from torchvision.datasets.folder import find_classes

    folders = "n2 n10 10 9 Bee ant bat é a-3 a-20"
    make_tree(tmp_path / "in", {f"{name}/0.jpg": b"" for name in folders.split()})
    of = source(folders)
    assert labeled(of).labels == find_classes(str(tmp_path / "in"))[1]
    natural = labeled(of, order="natural").labels
    assert natural == find_images_and_targets(str(tmp_path / "in"))[1] != labeled(of).labels


def test_natural_ties_are_sorted_by_name() -> None:
    assert [*labeled(source("b1 B1 b01 a"), order="natural").names] == ["a", "B1", "b01", "b1"]


def test_a_list_without_labels_numbers_nothing() -> None:
    none = source("", "pool", order="")
    options = PackOptions(src=("src",), out=Path("OUT"))
    found = label_classes([source("bee"), none], None, {"bee"}, set(), 2, options)
    assert found.labels == {"bee": 0}


@pytest.mark.parametrize(
    ("classes", "order", "warned"),
    [("1 2 10", "name", True), ("1 2 10", "natural", False), ("0 1 2", "name", False),
     ("1 2 10 ant", "name", False), (f"1 2{5000 * '0'}", "name", False),
     (f"1 2{5000 * '0'} 3", "natural", False)],
)  # fmt: skip
def test_numbered_folders_out_of_order_are_a_warning(
    classes: str, order: str, warned: bool
) -> None:
    line = (
        "src: its numbered classes are sorted as texts, 10 before 2, as by torchvision; "
        "--class-order natural sorts them as numbers, as timm does"
    )
    assert labeled(source(classes), order=order).warnings == ([line] if warned else [])


def test_numbers_of_a_list_fit_naturally_sorted_folders() -> None:
    train, val = (
        source(" ".join(map(str, range(11)))),
        source("2 10", "v", "0 1 2 3 4 5 6 7 8 9 10"),
    )
    assert labeled(train, val, order="natural").labels == {str(at): at for at in range(11)}
    with pytest.raises(DataError, match=r"v: its labels are numbers.* \(class 10 has label 2\)"):
        labeled(train, val)


# The file of classes.


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("ant\nbee\n", "", "ant| bee|"),
        ("\ufeffant\r\nbee\r\n\n", "", "ant| bee|"),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish", "",
         "n01440764|tench, Tinca tinca n01443537|goldfish"),
        ("a1 fire ant\na2 bee", "a2", "a1|fire ant a2|bee"),
        # A space belongs to a name in every line, in some, or where a tab is.
        ("polar bear\nblack bear", "polar bear", "polar bear| black bear|"),
        ("polar bear\nblack bear", "", "polar bear| black bear|"),
        ("polar bear\nbear brown one", "polar bear,bear", "polar bear| bear|brown one"),
        ("polar bear\tUrsus\nbear brown", "bear", "polar bear|Ursus bear brown|"),
        ("polar bear\t\nbear\t a\tb ", "polar", "polar bear| bear|a\tb"),
        ("0 zero\n1", "0,1", "0|zero 1|"),
    ],
)  # fmt: skip
def test_lines_of_the_file(tmp_path: Path, text: str, known: str, expected: str) -> None:
    (tmp_path / "f").write_text(text, newline="")
    found = read_classes(tmp_path / "f", known.split(","))
    assert " ".join(map("|".join, zip(*found, strict=True))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: names no class"),
        ("\n", "f: names no class"),
        ("ant\n\nbee\n", "f: line 2 is empty: label 1 has no name"),
        ("ant\nbee\nant\n", "f: line 3: ant is on line 1 already"),
        ("ant\tone\nant\ttwo\n", "f: line 2: ant is on line 1 already"),
        ("ant\n\tbee\n", "f: line 2: '\\tbee': a title without a name"),
        ("x/ant\n", "f: line 1: 'x/ant': a class has no / in its name"),
    ],
)
def test_refused_files(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text(text)
    with pytest.raises(DataError) as caught:
        read_classes(Path("f"), [])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("train", "val", "text", "labels"),
    [
        (source("ant bee"), source("bee ant"), "bee\nant", {"bee": 0, "ant": 1}),
        # Labels that have no names are named, those that have one keep it.
        (source("0 1", order="0 1"), source("ant"), "bee\nant",
         {"0": 0, "1": 1, "bee": 0, "ant": 1}),
        (source("0 1", order="0 1"), source("1", order="0 1"), "bee\nant",
         {"0": 0, "1": 1, "bee": 0, "ant": 1}),
        (source("cat 1", order="cat 1"), None, "cat\nant", {"cat": 0, "1": 1, "ant": 1}),
        (source("ant bee"), source("0 1", order="0 1"), "bee\nant",
         {"bee": 0, "ant": 1, "0": 0, "1": 1}),
    ],
)  # fmt: skip
def test_labels_by_file(
    tmp_path: Path, train: Source, val: Source | None, text: str, labels: dict[str, int]
) -> None:
    (tmp_path / "f").write_text(text)
    found = labeled(train, val, file=tmp_path / "f")
    assert (list(found.names), found.labels) == (text.split(), labels)
    assert found.titles == []


@pytest.mark.parametrize(
    ("train", "val", "text", "message"),
    [
        (source("ant bee cat"), None, "bee", "src: 2 classes are not in f: ant, cat"),
        (source("ant"), source("bee", "v"), "ant", "v: 1 class is not in f: bee"),
        (source("0 1 2", order="0 1 2"), None, "ant\nbee",
         "f: names 2 classes, but src has the labels 0 to 2"),
        (source("cat dog", order="cat dog"), None, "cat\nant",
         "f: line 2: label 1 is ant, but dog in src"),
        (source("0 1", order="0 1"), None, "1\n0", "f: line 1: label 0 is 1, but 0 in src"),
        (source("ant"), None, "ant\n" + "".join(f"x{at}\n" for at in range(1000)),
         "f: 1001 classes, but src has images of 1: keep only the lines of classes that are to "
         "have a label"),
    ],
)  # fmt: skip
def test_refused_labels(
    tmp_path: Path,
    train: Source,
    val: Source | None,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text(text)
    with pytest.raises(DataError) as caught:
        labeled(train, val, file=Path("f"))
    assert str(caught.value) == message


def test_natural_order_of_numbered_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="--class-order natural: src numbers its classes itself"):
        labeled(source("0 1", order="0 1"), order="natural")


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    """The first ten, and where the others are listed; their labels stay."""
    (tmp_path / "f").write_text("".join(f"c{at:02}\n" for at in range(21)))
    held = source(" ".join(f"c{at:02}" for at in range(0, 21, 2)), "v")
    found = labeled(source("c03 c19"), held, file=tmp_path / "f")
    few = "c00, c01, c02, c04, c05, c06, c07, c08, c09, c10 and 9 more"
    odd = ", ".join(f"c{at:02}" for at in range(1, 21, 2))
    assert found.warnings == [
        f"{tmp_path}/f: no training image of 19 of the 21 classes: {few}; all: make_rec.py info "
        "--classes OUT",
        f"v: has no image of 10 of the 21 classes: {odd}",
    ]
    assert found.labels["c19"] == 19


# Packs.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six images of bee and of cat to train, one of bee to validate."""
    images = {f"train/{name}/{at}.jpg": jpeg(at + len(name)) for name in ("bee", "cat")
              for at in range(6)}  # fmt: skip
    (tmp_path / "words.txt").write_text(WORDS)
    return make_tree(tmp_path, images | {"val/bee/0.jpg": jpeg(99)})


def packed(tree: Path, *options: object, status: int = 0) -> Done:
    how = ("--labeled", 2, "--check", "none", "--out", tree / "out")
    return run("pack", "--src", *options, *how, status=status)


def test_titles_go_with_the_pack(tree: Path) -> None:
    given = (tree / "train", "--val", tree / "val", "--classes", tree / "words.txt")
    done, out = packed(tree, *given), tree / "out"
    assert done.stderr.splitlines()[:2] == [
        f"make_rec: warning: {tree}/words.txt: no training image of 1 of the 3 classes: ant",
        f"make_rec: warning: {tree}/val: has no image of 2 of the 3 classes: ant, cat",
    ]
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"
    assert {row[1] for row in read_split(out, "train")} == {1.0, 2.0}
    manifest = read_manifest(out)
    assert manifest.titles == ("Ameise, Emse", "", "Katze")
    assert [manifest.class_text(label) for label in range(3)] == [
        "ant (Ameise, Emse)", "bee", "cat (Katze)",
    ]  # fmt: skip
    listed = run("info", out, "--classes").stdout.splitlines()[-3:]
    assert listed == [
        "class 0     ant (Ameise, Emse): no image in train, no image in labeled, "
        "no image in unlabeled, no image in val",
        "class 1     bee: train 6, labeled 1, unlabeled 6, val 1",
        "class 2     cat (Katze): train 6, labeled 1, unlabeled 6, no image in val",
    ]
    found = json.loads(run("info", out, "--classes", "--json").stdout)
    counts = {"train": 6, "labeled": 1, "unlabeled": 6, "val": 0}
    assert found["per_class"][2] == {"label": 2, "name": "cat", "title": "Katze", "records": counts}
    assert "per_class" not in json.loads(run("info", out, "--json").stdout)
    found = json.loads(run("extract", out, "cat/0.jpg", "--to", tree / "0.jpg", "--json").stdout)
    assert (found["label"], found["title"]) == (2, "Katze")
    assert "label   2 (Katze)" in run("extract", out, "cat/1.jpg", "--to", tree / "1.jpg").stdout

    run("resplit", out, "--labeled", 4)
    assert read_manifest(out).titles == manifest.titles
    assert verified(out).problems == ()
    stored = manifest_of(out)
    stored["classes"]["titles"][2] = "Kater"
    (out / "manifest.json").write_text(json.dumps(stored))
    assert "its classes are not those of records.sqlite" in str(verified(out).problems[0])


def test_another_title_is_another_pack(tree: Path) -> None:
    given = (tree / "train", "--classes", tree / "words.txt")
    packed(tree, *given)
    assert "already complete" in packed(tree, *given).stdout
    (tree / "words.txt").write_text(WORDS.replace("Katze", "Kater"))
    assert "holds another pack" in error_of(packed(tree, *given, status=3))


def test_without_a_file_a_pack_is_as_before(tree: Path) -> None:
    packed(tree, tree / "train")
    stored = manifest_of(tree / "out")
    assert {*stored["classes"]} == {"n", "file", "sha256"}
    assert not {"classes", "class_order"} & {*stored["options"]}
    assert read_manifest(tree / "out").titles == ()
    (tree / "words.txt").write_text("cat\nbee\n")  # nor are there titles in every file
    how = ("--classes", tree / "words.txt", "--force")
    packed(tree, tree / "train", *how)
    stored = manifest_of(tree / "out")
    assert {*stored["classes"]} == {"n", "file", "sha256"}
    assert stored["options"]["classes"] == str(tree / "words.txt")


def test_classes_of_an_unfinished_pack(tree: Path) -> None:
    out = tree / "out"
    run("pack", "--src", tree / "train", "--val", tree / "val", "--classes", tree / "words.txt",
        "--labeled", 2, "--part", "1/2", "--out", out)  # fmt: skip
    *_, bee, cat = run("info", out, "--classes").stdout.splitlines()
    assert bee.endswith(" bee: train 6, labeled 1, unlabeled 6, val 1")
    assert cat.endswith(" cat (Katze): train 6, labeled 1, unlabeled 6, no image in val")


def test_labels_of_images_that_have_none_are_in_no_class(tree: Path) -> None:
    run("pack", "--src", tree / "train", "--unlabeled-src", tree / "val", "--unlabeled", "rest",
        "--out", tree / "out")  # fmt: skip
    last = run("info", tree / "out", "--classes").stdout.splitlines()[-1]
    assert last.endswith("cat: train 6, labeled 6")  # unlabeled has labels of no image


@pytest.mark.parametrize("kind", ["rec", "lst", "tar", "parquet"])
def test_a_file_names_labels(tree: Path, kind: str) -> None:
    """Of sources that number them; a drawn image is then drawn again, as names are hashed."""
    out = tree / "out"
    spec = numbered_source(tree, kind, (1, 2, 1, 2))
    run("pack", "--src", spec, "--classes", tree / "words.txt", "--labeled", 4, "--out", out)
    assert manifest_of(out)["classes"]["titles"] == ["Ameise, Emse", "", "Katze"]
    found = {
        (label, key.partition("/")[0], image) for _, label, key, image in read_split(out, "train")
    }
    assert found == {(at % 2 + 1, ("bee", "cat")[at % 2], jpeg(at)) for at in range(8)}
    drawn = read_split(out, "train_label")
    run("resplit", out, "--labeled", 4)
    assert read_split(out, "train_label") == drawn


def test_both_options_are_one_error(tree: Path) -> None:
    how = ("--src", tree / "train", "--out", tree / "out")
    both = ("--class-order", "name", "--classes", tree / "words.txt")
    assert "--classes: not allowed with argument --class-order" in refuse(*how, *both, status=2)
    (tree / "empty").mkdir()  # not yet searched
    missing = refuse(*how, "--src", tree / "empty", "--classes", tree / "none", status=4)
    assert missing.endswith(f"{tree / 'none'}: No such file or directory")
    assert "out" not in names(tree)
