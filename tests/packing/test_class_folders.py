"""Which folder is the class: every layout, and random trees compared with a plain walk."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.options import SplitOptions
from tests.packing.made_sources import keys, listed, opened, plan_of
from tests.packing.packs import (
    error_of,
    jpeg,
    make_tar,
    make_tree,
    pack,
    read_split,
    refuse,
    run,
)

TINY = ["n1/images/1.jpg", "n2/images/2.jpg"]
BREEDS = ["dog/rex/1.jpg", "dog/fido/2.jpg", "cat/tom/3.jpg", "cat/tom/4.jpg"]
DEPTHS = ["dog/1.jpg", "dog/rex/2.jpg"]
SPLITS = ["train/n1/1.jpg", "train/n2/2.jpg", "val/3.jpg", "test/4.jpg"]


def made(tmp_path: Path, names: list[str]) -> Path:
    return make_tree(tmp_path / "in", {name: name.encode() for name in names})


@pytest.mark.parametrize(
    ("names", "class_from", "expected", "reported"),
    [
        (["ant/1.jpg", "bee/2.jpg"], None, ["ant/1.jpg", "bee/2.jpg"], ""),
        (["w/x/ant/1.jpg", "w/x/bee/2.jpg"], None, ["ant/1.jpg", "bee/2.jpg"], "below w/x/"),
        (["dog/rex/1.jpg"], None, ["rex/1.jpg"], "below dog/"),
        (["images/1.jpg", "text/2.jpg"], None, ["images/1.jpg", "text/2.jpg"], ""),
        (TINY, None, ["n1/1.jpg", "n2/2.jpg"], "above images/"),
        ([f"w/{name}" for name in TINY], None, ["n1/1.jpg", "n2/2.jpg"],
         "below w/ and above images/"),
        (TINY, "top", ["n1/1.jpg", "n2/2.jpg"], ""),
        (TINY, "leaf", ["images/1.jpg", "images/2.jpg"], ""),
        (BREEDS, "top", ["cat/3.jpg", "cat/4.jpg", "dog/1.jpg", "dog/2.jpg"], ""),
        (BREEDS, "1", ["cat/3.jpg", "cat/4.jpg", "dog/1.jpg", "dog/2.jpg"], ""),
        (BREEDS, "leaf", ["fido/2.jpg", "rex/1.jpg", "tom/3.jpg", "tom/4.jpg"], ""),
        (BREEDS, "2", ["fido/2.jpg", "rex/1.jpg", "tom/3.jpg", "tom/4.jpg"], ""),
        (DEPTHS, "top", ["dog/1.jpg", "dog/2.jpg"], ""),
        (DEPTHS, "leaf", ["dog/1.jpg", "rex/2.jpg"], ""),
        (SPLITS, "leaf", ["n1/1.jpg", "n2/2.jpg", "test/4.jpg", "val/3.jpg"], ""),
    ],
)  # fmt: skip
def test_class_of_each_image(
    tmp_path: Path,
    names: list[str],
    class_from: str | None,
    expected: list[str],
    reported: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = made(tmp_path, names)
    assert keys(listed(spec, tmp_path, class_from=class_from)[1]) == expected
    printed = f"{spec}: classes are the folders {reported}\n" if reported else ""
    assert capsys.readouterr().out == printed


def which(first: str, last: str, below: str = "", top: str = "top") -> str:
    """Return the message that shows the two readings."""
    return (
        f"which folders are the classes, the first ones{below} ({first}) or the last ones ({last})?"
        f" give --class-from {top}, leaf or the number of a folder"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (BREEDS, which("2: cat 2, dog 2", "3: fido 1, rex 1, tom 2")),
        (
            [f"all/of/{name}" for name in BREEDS],
            which("2: cat 2, dog 2", "3: fido 1, rex 1, tom 2", " below all/of/", "3"),
        ),
        (
            [f"{number % 6}/{number}/x.jpg" for number in range(9)],
            which("6: 0 2, 1 2, 2 2, 3 1 and 2 more", "9: 0 1, 1 1, 2 1, 3 1 and 5 more"),
        ),
        (DEPTHS, which("1: dog 2", "2: dog 1, rex 1")),
        (["ant/1.jpg", "x/ant/2.jpg"], which("2: ant 1, x 1", "1: ant 2")),
        (["ant/images/1.jpg", "bee/2.jpg"], which("2: ant 1, bee 1", "2: bee 1, images 1")),
        (
            SPLITS,
            "test and train and val are splits, not classes: give IN/train as --src and IN/val as "
            "--val with --val-labels; if they are classes, give --class-from top",
        ),
        (
            ["x/train/n1/1.jpg", "x/Test_set/train/2.jpg", "x/unlabeled/n1/3.jpg", "x/y/4.jpg"],
            "Test_set and train and unlabeled are splits, not classes: give IN/x/train as --src "
            "and IN/x/Test_set as --val and IN/x/unlabeled as --unlabeled-src; if they are "
            "classes, give --class-from 2",
        ),
        (
            ["train/1.jpg"],
            "train is a split, not a class: give IN/train as --src with --labels (or as "
            "--unlabeled-src); if it is a class, give --class-from top",
        ),
        (
            ["1.jpg", "ant/2.jpg"],
            "1 image is outside any class folder: 1.jpg; move them into one, or away, or give all "
            "classes with --labels (of --val: --val-labels)",
        ),
    ],
)
@pytest.mark.parametrize("form", ["tree", "tar", "folder of a tar"])
def test_uncertain_classes(tmp_path: Path, form: str, names: list[str], message: str) -> None:
    spec = inside = str(made(tmp_path, names))
    if form == "tar":
        spec = str(make_tar(tmp_path / "in.tar", [(name, b"1") for name in names]))
        inside = f"{spec}:"
    elif form != "tree":
        archive = make_tar(tmp_path / "in.tar", [(f"in/{name}", b"1") for name in names])
        spec = inside = f"{archive}:in"
    line = refuse("--src", spec, "--out", tmp_path / "out", status=4)
    assert line == f"make_rec: error: {spec}: {message}".replace("IN", inside).replace(":/", ":")


@pytest.mark.parametrize(
    ("names", "class_from", "warning"),
    [
        (
            ["a/x/1.jpg", "b/x/2.jpg", "b/y/3.jpg"],
            "leaf",
            "1 class is merged from several folders: a/x + b/x; if these are splits, name one of "
            "them",
        ),
        (
            ["train/1.jpg", "plane/2.jpg", "test/3.jpg", "images/4.jpg"],
            None,
            "3 classes are named as splits or folders of images are: images, test, train",
        ),
        (
            SPLITS,
            "top",
            "3 classes are named as splits or folders of images are: test, train, val",
        ),
        (BREEDS, "top", ""),
    ],
)
def test_warnings(tmp_path: Path, names: list[str], class_from: str | None, warning: str) -> None:
    spec = made(tmp_path, names)
    source, _ = listed(spec, tmp_path, class_from=class_from)
    assert source.warnings == ([f"{spec}: {warning}"] if warning else [])


@pytest.mark.parametrize("names", [BREEDS, SPLITS, ["1.jpg"]])
def test_folders_that_give_no_classes(tmp_path: Path, names: list[str]) -> None:
    spec = made(tmp_path, names)
    source = opened(spec, tmp_path, unlabeled=True)
    assert (len(list(source.images())), source.warnings) == (len(names), [])
    lines = (f"{name.rpartition('/')[2]}\tant\t0\n" for name in names)
    (spec / "val_annotations.txt").write_text("".join(lines))
    assert keys(listed(spec, tmp_path)[1]) == sorted(
        f"ant/{name.rpartition('/')[2]}" for name in names
    )


def test_annotations_that_cannot_be_read(tmp_path: Path) -> None:
    spec = made(tmp_path, ["ant/1.jpg"])
    (spec / "val_annotations.txt").symlink_to("/proc/self/mem")
    line = refuse("--src", spec, "--out", tmp_path / "out", status=4)
    assert line == f"make_rec: error: {spec}/val_annotations.txt: Input/output error"


def test_images_that_are_not_deep_enough(tmp_path: Path) -> None:
    message = r"2 images are below fewer than 2 folders: 1.jpg, dog/1.jpg; give another --class-fr"
    with pytest.raises(DataError, match=message):
        listed(made(tmp_path, [*DEPTHS, "1.jpg"]), tmp_path, class_from="2")


def test_empty_folders(tmp_path: Path) -> None:
    """A folder entry of a tar is not empty because its images are in folders without an entry."""
    names = ["w/", "w/ant/1.jpg", "w/bee/2.jpg", "w/cat/", "x/", "x/y/z/"]
    archive = make_tar(tmp_path / "in.tar", [(name, b"") for name in names])
    source, images = listed(archive, tmp_path)
    assert keys(images) == ["ant/1.jpg", "bee/2.jpg"]
    what = "2 folders hold no image and give no class: w/cat, x/y/z"
    assert source.warnings == [f"{archive}: {what}"]


def test_packed(tmp_path: Path) -> None:
    names = ("dog/rex/0.jpg", "dog/rex/1.jpg", "dog/fido/2.jpg", "cat/tom/3.jpg")
    tree = make_tree(tmp_path / "in", {name: jpeg(at) for at, name in enumerate(names)})
    how = ("--src", tree, "--val", tree, "--labeled", "all", "--class-from")
    out = pack(*how, "top", out=tmp_path / "out")
    for split in ("train", "val"):
        rows = sorted((label, key) for _, label, key, _ in read_split(out, split))
        dogs = [(1, f"dog/{number}.jpg") for number in range(3)]
        assert rows == [(0, "cat/3.jpg"), *dogs]
    again = run("pack", *how, "top", "--out", out)
    assert "already complete" in again.stdout
    assert again.stderr == ""  # no warning
    line = refuse(*how, "leaf", "--out", out, status=3)
    assert "holds another pack (class_from was top, now leaf" in line
    parts = tmp_path / "parts"
    run("pack", *how, "leaf", "--part", "1/2", "--out", parts)
    line = refuse(*how, "2", "--part", "2/2", "--out", parts, status=3)
    assert "the parts of this pack have other options (class_from was leaf, now 2)" in line


@pytest.mark.parametrize("class_from", [(), ("--class-from", "top")])
def test_all_images_in_one_class(tmp_path: Path, class_from: tuple[str, ...]) -> None:
    tree = make_tree(tmp_path / "in", {f"dog/{number}.jpg": jpeg(number) for number in range(3)})
    make_tree(tmp_path, {"val/a.jpg": jpeg(7), "labels.txt": b"a.jpg dog\n"})
    held = ("--val", tmp_path / "val", "--val-labels", tmp_path / "labels.txt")
    how = (*class_from, "--labeled", 1, "--out", tmp_path / "out")
    done = run("pack", "--src", tree, *held, *how)
    assert f"warning: {tree}: all 3 images with a label are in one class, dog\n" in done.stderr


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("list.lst", "top", "--class-from top: no source has class folders to name the classes"),
        ("flat --labels labels.txt", "2", "--class-from 2: no source has class folders to name"),
        ("annotated", "leaf", "--class-from leaf: no source has class folders to name the classes"),
        ("shard.tar", "leaf", "--class-from leaf: no source has class folders to name the classes"),
        ("ant", "0", "argument --class-from: 0 is not top, leaf or the number of a folder"),
        ("ant", "Top", "argument --class-from: Top is not top, leaf or the number of a folder"),
    ],
)
def test_option_without_use(tmp_path: Path, source: str, value: str, message: str) -> None:
    files = {
        "list.lst": b"0\t0\tant/a.jpg\n",
        "labels.txt": b"a.jpg ant\n",
        "flat/a.jpg": b"1",
        "ant/a.jpg": b"1",
        "annotated/images/a.jpg": b"1",
        "annotated/val_annotations.txt": b"a.jpg\tant\t0\n",
    }
    make_tree(tmp_path, files)
    make_tar(tmp_path / "shard.tar", [("a.jpg", b"1"), ("a.cls", b"0")])
    arguments = ("pack", "--src", *source.split(), "--class-from", value, "--out", "out")
    line = error_of(run(*arguments, folder=tmp_path, status=2))
    assert line.startswith(f"make_rec: error: {message}")
    assert not list((tmp_path / "out").glob("*"))


# Random trees.

CAFE = os.fsdecode(b"caf\xe9")
FOLDERS = ("ant", "bee", "c d", "\u00e9", CAFE, "n.1", "x.jpg", "-rf", "images", "Images")
SPLIT_FOLDERS = ("train", "Val", "test", "unlabeled", "train_set", "valid-2")
OTHERS = (".DS_Store", "Thumbs.db", "notes.txt", "readme", ".hidden.jpg", "jpg")
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".Png", ".JPEG", "", ".dat")
JPEG = b"\xff\xd8"
HOWS = (None, "top", "leaf", "1", "2", "3")
TREES = int(os.environ.get("FUZZ_TREES", "500"))
FIRST_TREE = int(os.environ.get("FUZZ_FIRST", "0"))


def grow(root: Path, seeded: random.Random, image: bytes) -> None:
    """Make a random tree."""
    pool = seeded.sample([*FOLDERS, *FOLDERS, *SPLIT_FOLDERS, "images", ".git"], 3)
    depth = seeded.choice([None, None, 1, 1, 2, 3])
    wrapper = seeded.choice([(), (), ("w",), ("train",), ("w", "x")])
    inner = seeded.choice([(), (), (), ("images",)])
    place = root
    for number in range(seeded.randint(1, 12)):
        if not number or seeded.random() < 0.7:
            levels = seeded.randint(0, 3) if depth is None else depth
            parts = (seeded.choice(pool) for _ in range(levels))
            place = root.joinpath(*wrapper, *parts, *(inner if seeded.random() < 0.9 else ()))
        place.mkdir(parents=True, exist_ok=True)
        name = f"{seeded.choice(['', 'a b', CAFE, '-', 'x.y'])}{number}{seeded.choice(SUFFIXES)}"
        kind = seeded.random()
        if kind < 0.06:
            content = b"text" if seeded.random() < 0.7 else image
            (place / seeded.choice(OTHERS)).write_bytes(content)
        elif kind < 0.1:
            (place / f"empty{number}" / seeded.choice(["", "deeper"])).mkdir(parents=True)
        elif kind < 0.11:
            (place / f"a\tb{number}.jpg").write_bytes(image)
        else:
            (place / name).write_bytes(image)


def link(root: Path, seeded: random.Random, elsewhere: Path) -> None:
    """Add a link to a file, a folder, a folder above or nothing."""
    place = seeded.choice([root, *sorted(path for path in root.rglob("*") if path.is_dir())])
    what = seeded.choice([elsewhere / "far.jpg", elsewhere, elsewhere, Path(".."), Path("nowhere")])
    (place / seeded.choice(["link.jpg", "link", ".link"])).symlink_to(what)


class RefusedError(Exception):
    """The plain walk, or the plain rule, has no class for every image."""


def walk(folder: Path, parts: tuple[str, ...], above: list[Path]) -> Iterator[tuple[str, ...]]:
    """Yield the path of each image, as its parts; RefusedError for links that lead nowhere."""
    above = [*above, folder.resolve()]
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.exists() or path.resolve() in above:
            raise RefusedError("a link to nothing, or to a folder above it")
        if path.is_dir():
            yield from walk(path, (*parts, path.name), above)
        elif path.suffix.lower() in (".jpg", ".jpeg", ".png") or path.read_bytes()[:2] == JPEG:
            yield (*parts, path.name)


def class_by_rule(folders: list[tuple[str, ...]], how: str | None) -> list[str]:
    """Return the class of each image from the folders above it."""
    if not folders or not all(folders):
        raise RefusedError("no image, or one outside any folder")
    if how is not None:
        at = {"top": 0, "leaf": -1, "1": 0, "2": 1, "3": 2}[how]
        if any(len(parts) <= at for parts in folders):
            raise RefusedError("an image below too few folders")
        return [parts[at] for parts in folders]
    inner = [len(parts) > 1 and parts[-1] == "images" for parts in folders]
    if any(inner):
        if not all(inner):
            raise RefusedError("not every class has a folder images")
        folders = [parts[:-1] for parts in folders]
    while len({parts[0] for parts in folders}) == 1 and min(map(len, folders)) > 1:
        folders = [parts[1:] for parts in folders]
    first = {parts[0] for parts in folders}
    named = {name for name in first if name.lower().startswith(("train", "val", "test", "unlab"))}
    if max(map(len, folders)) > 1 or 2 * len(named) > len(first):
        raise RefusedError("several readings")
    return [parts[0] for parts in folders]


def expected(root: Path, how: str | None) -> dict[str, str] | None:
    """Return the class of each image by its path; None if the tree has to be refused."""
    try:
        paths = list(walk(root, (), []))
        classes = class_by_rule([path[:-1] for path in paths], how)
    except RefusedError:
        return None
    if any("\t" in path[-1] for path in paths):
        return None
    return {"/".join(path): name for path, name in zip(paths, classes, strict=True)}


def found(spec: Path, work: Path, how: str | None, *, plan: bool) -> dict[str, str] | None:
    """Return the class of each image by its path, as listed or planned; None if it is refused."""
    source = opened(spec, work, class_from=how, report=lambda line: None)
    try:
        if not plan:
            return {image.path: image.class_name for image in source.images()}
        planned = plan_of(work / "plan", source, SplitOptions(labeled="all"))
    except DataError:
        return None
    return {row.path: planned.classes[row.label] for row in planned.rows}


def tar_of(root: Path, path: Path, seeded: random.Random) -> Path:
    """Write a tar of a tree without links, its members shuffled, some folders without entry."""
    members = [item for item in sorted(root.rglob("*")) if item.is_file() or seeded.random() < 0.7]
    names = (f"{item.relative_to(root)}{'/' * item.is_dir()}" for item in members)
    contents = (b"" if item.is_dir() else item.read_bytes() for item in members)
    rows = [*zip(names, contents, strict=True)]
    seeded.shuffle(rows)
    return make_tar(path, rows)


@pytest.mark.slow
def test_random_trees_are_packed_as_walked_or_refused(tmp_path: Path) -> None:
    image = jpeg(0)
    elsewhere = make_tree(tmp_path / "elsewhere", {"far.jpg": image, "sub/further.jpg": image})
    outcomes = dict.fromkeys([(how, done) for how in HOWS for done in (True, False)], 0)
    for number in range(FIRST_TREE, FIRST_TREE + TREES):
        seeded = random.Random(number)
        root = tmp_path / str(number)
        root.mkdir()
        grow(root, seeded, image)
        forms = [root, tar_of(root, tmp_path / "tree.tar", seeded)] if number % 2 else [root]
        if len(forms) == 1 and seeded.random() < 0.4:
            link(root, seeded, elsewhere)
        for how in (None, *seeded.sample(HOWS[1:], 2)):
            by_rule = expected(root, how)
            outcomes[how, by_rule is not None] += 1
            for spec in forms:
                plan = number % 5 == 0  # slower
                assert found(spec, tmp_path, how, plan=plan) == by_rule, (number, how, spec)
    assert min(outcomes.values()) > TREES // 50
