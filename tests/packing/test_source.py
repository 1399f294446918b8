"""Folders as sources: every image at any depth is listed, and every fault is reported."""

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.sources.archives import Spools
from mpl_fast.packing.sources.source import Source, open_source
from tests.packing.packs import content, keys, listed, make_records, make_tar, make_tree


def entries(spec: Path, spools: Path) -> list[tuple[str, bytes]]:
    """Return `class/name` and content of every image, sorted."""
    source, images = listed(spec, spools)
    return [(key, content(source, image)) for key, image in zip(keys(images), images, strict=True)]


def test_folder_at_any_depth(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        {"x/y/ant/1.jpg": b"1", "bee/2.JPG": b"22", "bee/.DS_Store": b"-", ".git/c/3.jpg": b"-"},
    )
    source, images = listed(tree, tmp_path)
    assert (source.spec, source.kind, source.file) == (str(tree), "folder", tree)
    assert (source.size, source.stamp, source.class_order) == (0, 0, None)
    assert [image.path for image in images] == ["x/y/ant/1.jpg", "bee/2.JPG"]
    assert entries(tree, tmp_path) == [("ant/1.jpg", b"1"), ("bee/2.JPG", b"22")]
    assert source.warnings == []


@pytest.mark.parametrize(
    "names",
    [
        [f"ant bee/{name}" for name in ("a b.jpg", "\"c'.JPEG", "é.PNG", "-rf.jpeg", "a.b.jpg")],
        [os.fsdecode(b"ant/caf\xe9.Jpg")],
        ["ant/a.jpg", "bee/a.jpg"],  # one name in two classes
        ["ant/a.jpg"],  # a single class
    ],
)
def test_names(tmp_path: Path, names: list[str]) -> None:
    contents = {name: os.fsencode(name) for name in names}
    tree = make_tree(tmp_path / "tree", contents)
    assert entries(tree, tmp_path) == sorted(contents.items())


@pytest.mark.parametrize(
    ("files", "images", "warnings"),
    [
        (
            ["x.JPEG/a.jpg", "ant/b.jpg", "ant/y.jpg/"],
            ["ant/b.jpg", "x.JPEG/a.jpg"],
            ["1 folders hold no image and give no class: ant/y.jpg"],
        ),
        (
            ["ant/a.jpg", "ant/b.gif", "ant/Thumbs.db", "readme.txt", "words/notes.txt", "empty/"],
            ["ant/a.jpg"],
            [
                "4 files are not images by name, left out: "
                "ant/Thumbs.db, ant/b.gif, readme.txt and 1 more",
                "2 folders hold no image and give no class: empty, words",
            ],
        ),
        (
            ["train/ant/1.jpg", "val/ant/2.jpg", "train/bee/3.jpg", "x/cat/4.jpg", "x/cat/5.jpg"],
            ["ant/1.jpg", "ant/2.jpg", "bee/3.jpg", "cat/4.jpg", "cat/5.jpg"],
            [
                "1 classes are merged from several folders: train/ant + val/ant; "
                "if these are splits, name one of them"
            ],
        ),
    ],
)
def test_warnings(tmp_path: Path, files: list[str], images: list[str], warnings: list[str]) -> None:
    tree = make_tree(tmp_path / "tree", {name: b"-" for name in files if name[-1] != "/"})
    for name in files:
        (tree / name if name[-1] == "/" else tree).mkdir(exist_ok=True)
    source, found = listed(tree, tmp_path)
    assert keys(found) == images
    assert source.warnings == [f"{tree}: {warning}" for warning in warnings]
    assert len(list(source.images())) == len(images)  # a second listing repeats no warning
    assert len(source.warnings) == len(warnings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ant/notes.txt",
            r"no image found \(looked for .jpg, .jpeg, .png\); .*ant/notes.txt",
        ),
        ("a.jpg", "a.jpg is outside any class folder; give the classes with a labels"),
        ("ant/a\tb.jpg", r"'ant/a\\tb.jpg' has a tab or line break"),
        ("ant/a\nb.jpg", r"'ant/a\\nb.jpg' has a tab or line break"),
        ("a\rnt/a.jpg", r"'a\\rnt/a.jpg' has a tab or line break"),
    ],
)
def test_bad_names(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed(make_tree(tmp_path / "tree", {name: b"-"}), tmp_path)
    with pytest.raises(DataError, match=message):
        listed(make_tar(tmp_path / "tree.tar", [(name, b"-")]), tmp_path)


def test_bad_specs(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"train/ant/a.jpg": b"one"})
    os.mkfifo(tmp_path / "pipe")
    for spec, message in (
        (tmp_path / "none", "none: no such folder or file"),
        (f"{tmp_path}/none.tar:train", "none.tar:train: no such folder or file"),
        (f"{tree}:train", f"{tree} is a folder; write {tree}/train"),
        (tmp_path / "pipe", "pipe: neither a file nor a folder"),
        ("x" * 300, "xxx: File name too long"),
        (f"{'x' * 300}:train", "x:train: File name too long"),
    ):
        with pytest.raises(DataError, match=message):
            listed(spec, tmp_path)


def test_links(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    outside = make_tree(tmp_path / "elsewhere", {"b.jpg": b"22"})
    (tree / "bee").symlink_to(outside)
    (tree / "ant" / "c.jpg").symlink_to(outside / "b.jpg")
    (tree / "ant" / "d.jpg").hardlink_to(outside / "b.jpg")
    expected = {"ant/a.jpg": b"1", "ant/c.jpg": b"22", "ant/d.jpg": b"22", "bee/b.jpg": b"22"}
    assert entries(tree, tmp_path) == list(expected.items())
    (tmp_path / "link").symlink_to(tree)
    assert listed(tmp_path / "link", tmp_path)[1] == listed(tree, tmp_path)[1]
    for name, target, message in (
        ("loop", tree, "loop: this link leads back"),
        ("self.jpg", "self.jpg", "self.jpg: Too many levels of symbolic links"),
        ("ant/gone.jpg", tmp_path / "nowhere", "gone.jpg: No such file"),
    ):
        (tree / name).symlink_to(target)
        with pytest.raises(DataError, match=message):
            listed(tree, tmp_path)
        (tree / name).unlink()


def test_special_file(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    os.mkfifo(tree / "ant" / "b.jpg")
    with pytest.raises(DataError, match=r"b.jpg: neither a file nor a folder"):
        listed(tree, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    (tree / "ant").chmod(0)
    with pytest.raises(DataError, match=r"ant: Permission denied"):
        listed(tree, tmp_path)
    (tree / "ant").chmod(0o700)


def opened(spec: Path, spools: Path) -> Source:
    return open_source(str(spec), root=None, labels=None, spools=Spools(spools, print))


def test_folder_removed_during_listing(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1", "bee/b.jpg": b"2"})
    images = opened(tree, tmp_path).images()
    left = "bee" if next(images).class_name == "ant" else "ant"
    shutil.rmtree(tree / left)
    with pytest.raises(DataError, match=rf"{left}: No such file"):
        list(images)


def make_many_files(root: Path, count: int) -> Path:
    return make_tree(root / f"{count}", {f"ant/{number}.jpg": b"" for number in range(count)})


def make_long_tar(root: Path, count: int) -> Path:
    return make_tar(root / f"{count}.tar", ((f"ant/{number}.jpg", b"") for number in range(count)))


def make_long_list(root: Path, count: int) -> Path:
    make_many_files(root, count)
    rows = "".join(f"{number}\t0\t{count}/ant/{number}.jpg\n" for number in range(count))
    (root / f"{count}.lst").write_text(rows)
    return root / f"{count}.lst"


def make_long_records(root: Path, count: int) -> Path:
    return make_records(root / f"{count}.rec", ((0, number, b"") for number in range(count)))


@pytest.mark.parametrize(
    "make", [make_many_files, make_long_tar, make_long_list, make_long_records]
)
def test_memory_does_not_grow_with_the_images(
    tmp_path: Path, make: Callable[[Path, int], Path]
) -> None:
    peaks = []
    for count in (200, 200, 2200):  # the first fills caches
        source = opened(make(tmp_path, count), tmp_path)
        tracemalloc.start()
        assert sum(1 for _ in source.images()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A list of 2,000 images takes more than 200 kB; the 16 bytes are hashes of a list's lines.
    assert peaks[2] - peaks[1] < 2000 * 16 + 20_000
