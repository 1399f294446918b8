"""Folders and archives are listed whole, byte for byte, and what is wrong with them is named."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.archives import Archives
from mpl_fast.packing.sources import ImageFile, Source, find_place, read_source

CONTENTS = {
    "train/ant/a.jpg": b"one",
    "train/ant/b.JPEG": b"two, longer",
    "train/bee/a.png": b"three" * 300,
    "test/ant/a.jpg": b"four",
}


def make_tree(root: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def make_tar(path: Path, contents: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in contents:
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def read(spec: Path | str, spool: Path) -> tuple[Source, list[bytes]]:
    """Return what is listed, and the bytes at each listed range."""
    with Archives(spool, lambda line: None) as archives:
        source = read_source(find_place(str(spec)), archives)
        return source, [range_of(image) for image in source.images]


def range_of(image: ImageFile) -> bytes:
    return Path(image.path).read_bytes()[image.offset :][: image.size]


def test_folder_at_any_depth(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        {"x/y/ant/1.jpg": b"1", "bee/2.JPG": b"22", "bee/.DS_Store": b"-", ".git/c/3.jpg": b"-"},
    )
    source, contents = read(tree, tmp_path)
    assert [image.key for image in source.images] == ["ant/1.jpg", "bee/2.JPG"]
    assert contents == [b"1", b"22"]
    assert source.warnings == []


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_archive_folder(tmp_path: Path, mode: str, prefix: str) -> None:
    rows = [(prefix + name, content) for name, content in CONTENTS.items()]
    archive = make_tar(tmp_path / "data.archive", rows, mode)
    for folder in ("train", "./train", "train/"):
        source, contents = read(f"{archive}:{folder}", tmp_path)
        assert [image.key for image in source.images] == ["ant/a.jpg", "ant/b.JPEG", "bee/a.png"]
        assert contents == list(CONTENTS.values())[:3]
    assert os.listdir(tmp_path) == ["data.archive"]  # noqa: PTH208 (no spool file is left)


def test_compressed_archive_is_unpacked_once(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "data.tar.xz", CONTENTS.items(), "w:xz")
    said: list[str] = []
    with Archives(tmp_path, said.append) as archives:
        train = read_source(find_place(f"{archive}:train"), archives)
        test = read_source(find_place(f"{archive}:test"), archives)
        assert len(list(tmp_path.glob(".spool-*.tmp"))) == 1
    assert (len(train.images), len(test.images)) == (3, 1)
    assert said == [f"unpacking {archive} once into a temporary file"]
    assert not list(tmp_path.glob(".spool-*"))


def test_tar_inside_a_tar_is_a_class_folder(tmp_path: Path) -> None:
    inner = make_tar(tmp_path / "n01.tar", [("n01_1.JPEG", b"fish"), ("n01_2.JPEG", b"bird")])
    other = make_tar(tmp_path / "n02.tar", [("n02_1.JPEG", b"cat")])
    rows = [(path.name, path.read_bytes()) for path in (inner, other)]
    source, contents = read(make_tar(tmp_path / "all.tar", rows), tmp_path)
    keys = [image.key for image in source.images]
    assert keys == ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG"]
    assert contents == [b"fish", b"bird", b"cat"]


def test_cut_or_empty_tar_inside_a_tar(tmp_path: Path) -> None:
    """What follows a cut inner tar is the outer one's: it must not pass for the inner's end."""
    images = [(f"{number}.jpg", b"x" * 600) for number in range(4)]
    whole = make_tar(tmp_path / "inner.tar", images).read_bytes()
    member = 512 + 1024
    for cut in (whole[: 2 * member], whole[: 2 * member + 512 + 300], b""):
        for rows in ([("n1.tar", whole), ("n2.tar", cut)], [("n1.tar", cut), ("n2.tar", whole)]):
            archive = make_tar(tmp_path / "outer.tar", rows)
            with pytest.raises(DataError, match=r"outer.tar: damaged or cut short after n[12]/"):
                read(archive, tmp_path)
    empty = make_tar(tmp_path / "empty.tar", []).read_bytes()
    archive = make_tar(tmp_path / "outer.tar", [("n1.tar", empty), ("n2.tar", whole)])
    source, _ = read(archive, tmp_path)
    assert len(source.images) == 4
    assert source.warnings == [f"{archive}: 1 folders hold no image and give no class: n1"]


def test_names_that_lead_out_of_the_archive(tmp_path: Path) -> None:
    rows = [("../ant/1.jpg", b"1"), ("/bee/2.jpg", b"22"), ("ant/../3.jpg", b"333")]
    source, contents = read(make_tar(tmp_path / "data.tar", rows), tmp_path)
    assert [image.key for image in source.images] == ["ant/1.jpg", "ant/3.jpg", "bee/2.jpg"]
    assert contents == [b"1", b"333", b"22"]


def test_tar_that_begins_like_bzip2(tmp_path: Path) -> None:
    source, contents = read(make_tar(tmp_path / "data.tar", [("BZh9/1.jpg", b"1")]), tmp_path)
    assert ([image.key for image in source.images], contents) == (["BZh9/1.jpg"], [b"1"])


def test_spool_that_cannot_be_written_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "data.tar.gz", CONTENTS.items(), "w:gz")
    spool = tmp_path / "none"
    with pytest.raises(OutputError, match=r"none.*: No such file"), Archives(spool, print) as all_:
        all_.open(archive)


def test_long_names(tmp_path: Path) -> None:
    name = f"{'d' * 150}/{'é' * 100}.jpg"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            item = tarfile.TarInfo(name)
            item.size = 3
            tar.addfile(item, io.BytesIO(b"abc"))
        source, contents = read(path, tmp_path)
        assert [image.key for image in source.images] == [name]
        assert contents == [b"abc"]


def test_warnings(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1", "ant/b.gif": b"2", "readme.txt": b"3"})
    make_tree(tree, {"words/notes.txt": b"4"})
    (tree / "empty").mkdir()
    source, _ = read(tree, tmp_path)
    others, empty = source.warnings
    assert others.endswith(
        "3 files are not images by name, left out: ant/b.gif, readme.txt, " + ("words/notes.txt")
    )
    assert empty.endswith("2 folders hold no image and give no class: empty, words")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"ant/notes.txt": b"-"}, "no image found"),
        ({"a.jpg": b"-"}, "a.jpg lies outside any class folder"),
        ({"x/ant/a.jpg": b"-", "y/ant/a.jpg": b"-"}, "1 names occur more than once .* ant/a.jpg"),
        ({"ant/a\tb.jpg": b"-"}, r"'ant/a\\tb.jpg' has a tab or line break"),
    ],
)
def test_bad_trees(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(make_tree(tmp_path / "tree", contents), tmp_path)
    with pytest.raises(DataError, match=message):
        read(make_tar(tmp_path / "tree.tar", contents.items()), tmp_path)


def test_bad_places(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", CONTENTS)
    archive = make_tar(tmp_path / "data.tar", CONTENTS.items())
    for spec, message in (
        (tmp_path / "none", "none: no such folder or archive"),
        (f"{tmp_path}/none.tar:train", "none.tar:train: no such folder or archive"),
        (f"{tree}:train", f"{tree} is a folder; write {tree}/train"),
        (f"{archive}:trian", "no folder 'trian' in this archive; it holds train, test"),
        (f"{archive}:trai", "no folder 'trai'"),
        ("x" * 300, "xxx: File name too long"),
        (f"{'x' * 300}:train", "x:train: File name too long"),
    ):
        with pytest.raises(DataError, match=message):
            read(spec, tmp_path)


def test_links(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"22")
    (tree / "bee").symlink_to(tmp_path / "elsewhere")
    (tree / "ant" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    source, contents = read(tree, tmp_path)
    assert [image.key for image in source.images] == ["ant/a.jpg", "ant/c.jpg", "bee/b.jpg"]
    assert contents == [b"1", b"22", b"22"]
    (tree / "loop").symlink_to(tree)
    with pytest.raises(DataError, match=r"loop: this link leads back"):
        read(tree, tmp_path)
    (tree / "loop").unlink()
    (tree / "ant" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.jpg: No such file"):
        read(tree, tmp_path)


def test_classes_merged_from_several_folders(tmp_path: Path) -> None:
    names = (
        "train/ant/1.jpg",
        "val/ant/2.jpg",
        "train/bee/3.jpg",
        "x/y/cat/4.jpg",
        "x/y/cat/5.jpg",
    )
    source, _ = read(make_tree(tmp_path / "tree", dict.fromkeys(names, b"-")), tmp_path)
    assert len(source.images) == 5
    assert source.warnings == [
        f"{tmp_path}/tree: 1 classes are merged from several folders: train/ant + val/ant; "
        "if these are splits, name one of them"
    ]


def test_times_in_the_future_are_left_out(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1", "ant/b.jpg": b"1"})
    for path, moment in ((tree / "ant", 1e9), (tree / "ant" / "a.jpg", 1.5e9)):
        os.utime(path, (moment, moment))
    os.utime(tree / "ant" / "b.jpg", (9e9, 9e9))
    assert read(tree, tmp_path)[0].modified == 1.5e9


def test_special_file(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"ant/a.jpg": b"1"})
    os.mkfifo(tree / "ant" / "b.jpg")
    with pytest.raises(DataError, match=r"b.jpg: neither a file nor a folder"):
        read(tree, tmp_path)


def test_damaged_tars(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "data.tar", CONTENTS.items()).read_bytes()
    rows = list(CONTENTS)
    third_header = 2 * 1024
    assert whole[third_header:].startswith(rows[2].encode())
    damaged = bytearray(whole)
    damaged[third_header + 150] ^= 1  # in the header's checksum
    for content, message in (
        (whole[: third_header + 600], "cut short after train/ant/b.JPEG"),  # inside an image
        (whole[: third_header + 100], "cut short after train/ant/b.JPEG"),  # inside a header
        (whole[:third_header], "cut short after train/ant/b.JPEG"),  # between two images
        (bytes(damaged), "cut short after train/ant/b.JPEG"),
        (b"no tar at all " * 100, "damaged or not a tar archive"),
        (b"", "damaged or not a tar archive"),
    ):
        (tmp_path / "data.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path / "data.tar", tmp_path)


@pytest.mark.parametrize("mode", ["w:xz", "w:gz"])
def test_damaged_compressed_tar(tmp_path: Path, mode: str) -> None:
    path = make_tar(tmp_path / "data", [("ant/a.jpg", os.urandom(5000))], mode)
    whole = path.read_bytes()
    for content in (whole[:3000], whole[:3000] + bytes(100) + whole[3100:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data: damaged or not a tar archive|data: CRC check"):
            read(path, tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["data"]


def test_link_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        item = tarfile.TarInfo("ant/a.jpg")
        item.type, item.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(item)
    with pytest.raises(DataError, match=r"ant/a.jpg is a link or sparse"):
        read(tmp_path / "data.tar", tmp_path)
