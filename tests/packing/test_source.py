"""Folders, and what all sources have in common: every image is listed, every fault reported."""

import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from mpl_fast.errors import ConfigError, DataError
from tests.packing.made_sources import entries, keys, listed, opened
from tests.packing.packs import make_records, make_tar, make_tree

both_forms = pytest.mark.parametrize("form", ["tree", "data.tar"])


def made(tmp_path: Path, form: str, names: Sequence[str]) -> Path:
    """Make a tree or an archive of files that contain their names, and of folders ("ant/")."""
    files = {name: os.fsencode(name) for name in names if name[-1] != "/"}
    if form == "data.tar":
        return make_tar(tmp_path / form, ((name, files.get(name, b"")) for name in names))
    tree = make_tree(tmp_path / form, files)
    for name in set(names) - files.keys():
        (tree / name).mkdir(exist_ok=True)
    return tree


def test_folder(tmp_path: Path) -> None:
    tree = made(tmp_path, "tree", ["ant/1.jpg", "bee/2.JPG", "bee/.DS_Store", ".git/c/3.jpg"])
    source, images = listed(tree, tmp_path)
    assert (source.spec, source.kind, source.file) == (str(tree), "folder", tree)
    assert (source.size, source.stamp, source.class_order) == (0, 0, None)
    assert [image.path for image in images] == ["ant/1.jpg", "bee/2.JPG"]
    assert entries(tree, tmp_path) == [("ant/1.jpg", b"ant/1.jpg"), ("bee/2.JPG", b"bee/2.JPG")]
    assert source.warnings == []
    assert source.decode(b"image") == b"image"


@both_forms
@pytest.mark.parametrize(
    "names",
    [
        [f"ant bee/{name}" for name in ("a b.jpg", "\"c'.JPEG", "é.PNG", "-rf.jpeg", "a.b.jpg")],
        [os.fsdecode(b"x.JPEG/caf\xe9.Jpg"), f"{'d' * 150}/{'é' * 100}.jpg", "ant/\u2028.jpg"],
        ["ant/a.jpg", "bee/a.jpg"],  # one name in two classes
        ["ant/a.jpg"],  # a single class
    ],
)
def test_names(tmp_path: Path, form: str, names: list[str]) -> None:
    expected = sorted((name, os.fsencode(name)) for name in names)
    assert entries(made(tmp_path, form, names), tmp_path) == expected


@both_forms
@pytest.mark.parametrize(
    ("files", "images", "warnings"),
    [
        (
            ["x.JPEG/a.jpg", "ant/b.jpg", "ant/y.jpg/"],
            ["ant/b.jpg", "x.JPEG/a.jpg"],
            ["1 folder holds no image and gives no class: ant/y.jpg"],
        ),
        (
            ["ant/a.jpg", "ant/.a.jpg", ".git/c/b.jpg", "ant/b.gz"],
            ["ant/a.jpg"],
            ["1 file is not an image, left out: ant/b.gz"],
        ),
        (
            [
                "ant/a.jpg",
                "ant/b.gz",
                "ant/Thumbs.db",
                "readme.txt",
                "words/n.txt",
                "empty/",
                "words/",
            ],
            ["ant/a.jpg"],
            [
                "4 files are not images, left out: ant/Thumbs.db, ant/b.gz, readme.txt and 1 more",
                "2 folders hold no image and give no class: empty, words",
            ],
        ),
    ],
)
def test_warnings(
    tmp_path: Path, form: str, files: list[str], images: list[str], warnings: list[str]
) -> None:
    spec = made(tmp_path, form, files)
    source, found = listed(spec, tmp_path)
    assert keys(found) == images
    assert source.warnings == [f"{spec}: {warning}" for warning in warnings]
    assert len(list(source.images())) == len(images)  # a second listing repeats no warning
    assert len(source.warnings) == len(warnings)


@both_forms
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ant/notes.txt", r"no image found \(by suffix or first bytes\); .*ant/notes.txt"),
        (
            "a.jpg",
            r"1 image is outside any class folder: a.jpg; give their classes with --labels .* or "
            "all as --unlabeled-src",
        ),
        ("ant/a\tb.jpg", r"'ant/a\\tb.jpg' has a tab or line break"),
        ("ant/a\nb.jpg", r"'ant/a\\nb.jpg' has a tab or line break"),
        ("a\rnt/a.jpg", r"'a\\rnt/a.jpg' has a tab or line break"),
    ],
)
def test_bad_names(tmp_path: Path, form: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed(made(tmp_path, form, [name]), tmp_path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["d/test-0-of-1.parquet", "d/train-0-of-1.parquet"], "/d holds parquet files: give '"
         "IN/d/train-*.parquet'"),
        (["b.tar.gz", "a.tar.gz"], " holds tars: give 'IN/*.tar.gz'"),
        (["x.txt", "a.tar"], " holds tars: give 'IN/a.tar'"),
        (["x/1.zip", "x/2.zip"], "/x holds zip archives: give 'IN/x/1.zip'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["ant/1.jpg"]])
def test_files_that_hold_images(
    tmp_path: Path, names: list[str], hint: str, more: list[str]
) -> None:
    tree = made(tmp_path, "in", [*names, *more])
    source = opened(tree, tmp_path)
    with nullcontext() if more else pytest.raises(DataError, match="no image found"):
        list(source.images())
    assert f"{tree}{hint}".replace("IN", str(tree)) in source.warnings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", "none: no such folder or file"),
        ("none.lst", "none.lst: no such folder or file"),
        ("none.tar:train", "none.tar:train: no such folder or file"),
        ("none*.tar", r"none\*.tar: no such folder or file"),
        ("{1..9999999}.tar", "stands for more than 1000000 files"),
        ("{1..999}{1..9999}.tar", "stands for more than 1000000 files"),
        ("tree:train", "tree is a folder; write .*tree/train"),
        ("pipe", "pipe: neither a file nor a folder"),
        ("x" * 300, "xxx: File name too long"),
        (f"{'x' * 300}:train", "x:train: File name too long"),
        ("a.rec:x", "a.rec:x: only an archive has folders; write .*a.rec$"),
        ("packed", "no image found; of packed records, name the .rec files"),
        ("packed:train", "holds packed records; name one of its .rec files"),
    ],
)
def test_bad_specs(tmp_path: Path, spec: str, message: str) -> None:
    make_tree(tmp_path, {"tree/train/ant/a.jpg": b"1", "packed/manifest.json": b"", "a.rec": b""})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=message):
        listed(tmp_path / spec, tmp_path)


@pytest.mark.parametrize("name", ["a.lst", "a.rec"])
def test_labels_for_sources_with_labels(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, {name: b"", "labels.txt": b"a.jpg ant\n"})
    with pytest.raises(ConfigError, match=f"{name} has its own labels: leave out .*labels.txt"):
        listed(tmp_path / name, tmp_path, labels=tmp_path / "labels.txt")


def test_links_and_special_files(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    outside = make_tree(tmp_path / "elsewhere", {"b.jpg": b"22"})
    (tree / "bee").symlink_to(outside)
    (tree / "ant" / "c.jpg").symlink_to(outside / "b.jpg")
    (tree / "ant" / "d.jpg").hardlink_to(outside / "b.jpg")
    expected = {"ant/a.jpg": b"1", "ant/c.jpg": b"22", "ant/d.jpg": b"22", "bee/b.jpg": b"22"}
    assert entries(tree, tmp_path) == list(expected.items())
    (tmp_path / "link").symlink_to(tree)
    assert listed(tmp_path / "link", tmp_path)[1] == listed(tree, tmp_path)[1]
    for name, make, message in (
        ("loop", lambda path: path.symlink_to(tree), "loop: this link leads back"),
        ("self.jpg", lambda path: path.symlink_to(path), "self.jpg: Too many levels of symbolic"),
        ("ant/gone.jpg", lambda path: path.symlink_to("nowhere"), "gone.jpg: No such file"),
        ("ant/pipe.jpg", os.mkfifo, "pipe.jpg: neither a file nor a folder"),
    ):
        make(tree / name)
        with pytest.raises(DataError, match=message):
            listed(tree, tmp_path)
        (tree / name).unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    (tree / "ant").chmod(0)
    with pytest.raises(DataError, match=r"ant: Permission denied"):
        listed(tree, tmp_path)
    (tree / "ant").chmod(0o700)


def test_folder_removed_during_listing(tmp_path: Path) -> None:
    tree = made(tmp_path, "tree", ["ant/a.jpg", "bee/b.jpg"])
    images = opened(tree, tmp_path).images()
    left = "bee" if next(images).class_name == "ant" else "ant"
    shutil.rmtree(tree / left)
    with pytest.raises(DataError, match=rf"{left}: No such file"):
        list(images)


def many(root: Path, count: int, suffix: str) -> Path:
    """Make a source of count empty images."""
    path = root / f"{count}{suffix}"
    names = [f"ant/{number}.jpg" for number in range(count)]
    if suffix == ".tar":
        return make_tar(path, ((name, b"") for name in names))
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        return path
    if suffix == ".rec":
        return make_records(path, ((0, number, b"") for number in range(count)))
    tree = make_tree(root / f"{count}", dict.fromkeys(names, b""))
    if not suffix:
        return tree
    path.write_text("".join(f"{at}\t0\t{count}/{name}\n" for at, name in enumerate(names)))
    return path


@pytest.mark.parametrize("suffix", ["", ".tar", ".zip", ".lst", ".rec"])
def test_memory_does_not_grow_with_the_images(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for count in (200, 200, 2200):  # the first fills caches
        source = opened(many(tmp_path, count, suffix), tmp_path)
        tracemalloc.start()
        assert sum(1 for _ in source.images()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A list of 2,000 images takes more than 200 kB; the 16 bytes are hashes of a list's lines.
    assert peaks[2] - peaks[1] < 2000 * 16 + 20_000
