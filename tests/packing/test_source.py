"""Folders are listed whole, whatever their files are called, and what is wrong is named."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.packing.small_sources import content, keys, listed, make_records, make_tar, make_tree

from mpl_fast.errors import DataError
from mpl_fast.packing.sources.archives import Spools
from mpl_fast.packing.sources.source import open_source


def test_folder_at_any_depth(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        {"x/y/ant/1.jpg": b"1", "bee/2.JPG": b"22", "bee/.DS_Store": b"-", ".git/c/3.jpg": b"-"},
    )
    source, images = listed(tree, tmp_path)
    assert (source.spec, source.kind, source.file) == (str(tree), "folder", tree)
    assert (source.size, source.stamp, source.class_order) == (0, 0, None)
    assert keys(images) == ["ant/1.jpg", "bee/2.JPG"]
    assert [image.path for image in images] == ["x/y/ant/1.jpg", "bee/2.JPG"]
    assert [content(source, image) for image in images] == [b"1", b"22"]
    assert source.warnings == []


def test_odd_names(tmp_path: Path) -> None:
    names = ("a b.jpg", "\"c'.JPEG", "é.PNG", os.fsdecode(b"caf\xe9.Jpg"), "-rf.jpeg", "a.b.jpg")
    tree = make_tree(
        tmp_path / "tree", {f"ant bee/{name}": name.encode("utf-8", "replace") for name in names}
    )
    source, images = listed(tree, tmp_path)
    assert keys(images) == sorted(f"ant bee/{name}" for name in names)
    for image in images:
        assert content(source, image) == image.name.encode("utf-8", "replace")


def test_folder_that_is_called_like_an_image(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"x.JPEG/a.jpg": b"1", "ant/b.jpg": b"2"})
    (tree / "ant" / "y.jpg").mkdir()
    source, images = listed(tree, tmp_path)
    assert keys(images) == ["ant/b.jpg", "x.JPEG/a.jpg"]
    assert source.warnings == [f"{tree}: 1 folders hold no image and give no class: ant/y.jpg"]


def test_one_class_and_equal_names_in_two(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1", "bee/a.jpg": b"22"})
    source, images = listed(tree, tmp_path)
    assert [content(source, image) for image in images] == [b"1", b"22"]
    (tree / "bee" / "a.jpg").unlink()
    (tree / "bee").rmdir()
    assert keys(listed(tree, tmp_path)[1]) == ["ant/a.jpg"]


def test_warnings(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        {
            "ant/a.jpg": b"1",
            "ant/b.gif": b"2",
            "ant/Thumbs.db": b"3",
            "readme.txt": b"4",
            "words/notes.txt": b"5",
        },
    )
    (tree / "empty").mkdir()
    source, _ = listed(tree, tmp_path)
    assert source.warnings == [
        f"{tree}: 4 files are not images by name, left out: "
        "ant/Thumbs.db, ant/b.gif, readme.txt and 1 more",
        f"{tree}: 2 folders hold no image and give no class: empty, words",
    ]
    assert len(list(source.images())) == 1  # listing again tells the same, once
    assert len(source.warnings) == 2


def test_classes_merged_from_several_folders(tmp_path: Path) -> None:
    names = ("train/ant/1.jpg", "val/ant/2.jpg", "train/bee/3.jpg", "x/y/cat/4.jpg")
    tree = make_tree(tmp_path / "tree", dict.fromkeys((*names, "x/y/cat/5.jpg"), b"-"))
    source, images = listed(tree, tmp_path)
    assert keys(images) == ["ant/1.jpg", "ant/2.jpg", "bee/3.jpg", "cat/4.jpg", "cat/5.jpg"]
    assert source.warnings == [
        f"{tree}: 1 classes are merged from several folders: train/ant + val/ant; "
        "if these are splits, name one of them"
    ]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"ant/notes.txt": b"-"},
            r"no image found \(looked for .jpg, .jpeg, .png\); .*ant/notes.txt",
        ),
        ({"a.jpg": b"-"}, "a.jpg is outside any class folder; give the classes with a labels"),
        ({"ant/a\tb.jpg": b"-"}, r"'ant/a\\tb.jpg' has a tab or line break"),
        ({"ant/a\nb.jpg": b"-"}, r"'ant/a\\nb.jpg' has a tab or line break"),
        ({"a\rnt/a.jpg": b"-"}, r"'a\\rnt/a.jpg' has a tab or line break"),
    ],
)
def test_bad_trees(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed(make_tree(tmp_path / "tree", contents), tmp_path)
    with pytest.raises(DataError, match=message):
        listed(make_tar(tmp_path / "tree.tar", contents.items()), tmp_path)


def test_bad_places(tmp_path: Path) -> None:
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
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"22")
    (tree / "bee").symlink_to(tmp_path / "elsewhere")
    (tree / "ant" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    (tree / "ant" / "d.jpg").hardlink_to(tmp_path / "elsewhere" / "b.jpg")
    source, images = listed(tree, tmp_path)
    assert keys(images) == ["ant/a.jpg", "ant/c.jpg", "ant/d.jpg", "bee/b.jpg"]
    assert [content(source, image) for image in images] == [b"1", b"22", b"22", b"22"]
    (tmp_path / "link").symlink_to(tree)
    assert listed(tmp_path / "link", tmp_path)[1] == images
    (tree / "loop").symlink_to(tree)
    with pytest.raises(DataError, match=r"loop: this link leads back"):
        listed(tree, tmp_path)
    (tree / "loop").unlink()
    (tree / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(DataError, match=r"self.jpg: Too many levels of symbolic links"):
        listed(tree, tmp_path)
    (tree / "self.jpg").unlink()
    (tree / "ant" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.jpg: No such file"):
        listed(tree, tmp_path)


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


def test_folder_that_vanishes_while_it_is_listed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1", "bee/b.jpg": b"2"})
    source = open_source(str(tree), root=None, labels=None, spools=Spools(tmp_path, print))
    images = source.images()
    seen = next(images).class_name
    left = "bee" if seen == "ant" else "ant"
    next((tree / left).iterdir()).unlink()
    (tree / left).rmdir()
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
        source = open_source(
            str(make(tmp_path, count)), root=None, labels=None, spools=Spools(tmp_path, print)
        )
        tracemalloc.start()
        assert sum(1 for _ in source.images()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A list of 2,000 images takes more than 200 kB; the 16 bytes are hashes of a list's lines.
    assert peaks[2] - peaks[1] < 2000 * 16 + 20_000
