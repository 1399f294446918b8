"""Lists of images: what is read, and every fault with its line."""

import os
import re
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted
from mpl_fast.packing.sources.lists import Line, class_names, read_list, whole_label
from tests.packing.made_sources import content, entries, keys, listed
from tests.packing.packs import make_tree


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_list_of_files(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"x/ant/a.jpg": b"1", "y/bee/b.png": b"22", "c.gif": b"3"})
    path = write(tmp_path / "all.lst", "7\t2\tx/ant/a.jpg\n9\t0\t./y/bee/b.png\n8\t4\tc.gif\n")
    source, images = listed(path, tmp_path, root=tree)
    assert (source.kind, source.file, source.size, source.stamp) == ("folder", tree, 0, 0)
    assert keys(images) == ["4/c.gif", "ant/a.jpg", "bee/b.png"]
    assert [image.path for image in images] == ["c.gif", "x/ant/a.jpg", "y/bee/b.png"]
    assert [content(source, image) for image in images] == [b"3", b"1", b"22"]
    assert source.class_order == ("bee", "1", "ant", "3", "4")
    assert source.warnings == []
    beside = write(tree / "all.lst", path.read_bytes())
    assert listed(beside, tmp_path)[1] == images
    with pytest.raises(DataError, match=r"none: no such folder; the images listed in .*all.lst"):
        listed(path, tmp_path, root=tmp_path / "none")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_marks_and_blank_lines(tmp_path: Path, end: str, mark: str) -> None:
    rows = (f"{mark}0\t16.000000\ta b/é.jpg", "", " \t ", '1\t1e3\t"c".jpg')
    path = write(tmp_path / "a.lst", end.join(rows))
    assert list(read_list(path)) == [Line(1, 0, 16, "a b/é.jpg"), Line(4, 1, 1000, '"c".jpg')]


def test_odd_and_absolute_paths(tmp_path: Path) -> None:
    name = b"ant/caf\xe9\x0b\xe2\x80\xa8.jpg"  # no UTF-8, and line breaks only in Unicode
    make_tree(tmp_path, {os.fsdecode(name): b"1"})
    for written in (name, os.fsencode(tmp_path) + b"/" + name):
        path = write(tmp_path / "a.lst", b"0\t0\t" + written + b"\n")
        assert entries(path, tmp_path) == [(os.fsdecode(name), b"1")]
        assert listed(path, tmp_path)[1][0].path == os.fsdecode(name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\t0", r"'1\\t0' is not `id TAB label TAB path`"),
        ("1 0 b.jpg", "'1 0 b.jpg' is not `id TAB label TAB path`"),
        ("1\t0\t", r"'1\\t0\\t' is not `id TAB label TAB path`"),
        ("1\t0\t1\tb.jpg", "2 labels, but only one an image can be packed"),
        ("x\t0\tb.jpg", "id 'x' is no whole number"),
        ("1.5\t0\tb.jpg", "id '1.5' is no whole number"),
        ("1\tant\tb.jpg", "label 'ant' is no number"),
        ("1\tnan\tb.jpg", r"label nan is no whole number in 0..16777215"),
        ("1\tinf\tb.jpg", "label inf is no whole number"),
        ("1\t-2\tb.jpg", r"label -2 is no whole number in 0..16777215 \(or -1: no label\)"),
        ("1\t2.5\tb.jpg", "label 2.5 is no whole number"),
        ("1\t16777216\tb.jpg", "label 16777216 is no whole number"),
        ("1\t0\t../b.jpg", r"\.\./b.jpg is not below .*; see --root"),
        ("1\t0\tx/../../b.jpg", r"x/\.\./\.\./b.jpg is not below"),
        ("1\t0\t/b.jpg", "/b.jpg is not below"),
        ("1\t0\t.", r"\. is not below"),
        ("1\t0\ta.jpg", "a.jpg is on line 1 already"),
        ("1\t1\tx/.././a.jpg", "a.jpg is on line 1 already"),
    ],
)
def test_bad_lines(tmp_path: Path, row: str, message: str) -> None:
    make_tree(tmp_path, {"a.jpg": b"1"})
    path = write(tmp_path / "a.lst", f"0\t0\ta.jpg\n\n{row}\n")
    with pytest.raises(DataError, match=rf"a.lst: line 3: {message}"):
        listed(path, tmp_path)


def test_largest_label() -> None:
    assert whole_label("16777215.0") == whole_label(16777215.0) == (1 << 24) - 1


def test_missing_files_and_empty_list(tmp_path: Path) -> None:
    make_tree(tmp_path, {"ant/a.jpg": b"1"})
    rows = ["0\t0\tant/a.jpg", *(f"{n}\t0\tant/{n:02}.jpg" for n in range(1, 13)), "13\t0\tant"]
    path = write(tmp_path / "a.lst", "\n".join(rows))
    shown = ", ".join(["ant (line 14)", *(f"ant/{n:02}.jpg (line {n + 1})" for n in range(1, 10))])
    message = f"{path}: 13 files are not in {tmp_path}: {shown} and 3 more"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        listed(path, tmp_path)
    with pytest.raises(DataError, match=r"a.lst: lists no image"):
        listed(write(path, "\n\n"), tmp_path)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (["0\tx/ant/a.jpg", "0\ty/ant/b.jpg", "1\tbee/c.jpg"], ("ant", "bee")),
        (["0\tant/a.jpg", "0\tbee/b.jpg", "1\tcat/c.jpg"], ("0", "cat")),  # a label, two folders
        (["0\tant/a.jpg", "0\tbee/b.jpg", "0\tant/c.jpg"], ("0",)),
        (["0\tx/ant/a.jpg", "1\ty/ant/b.jpg"], ("0", "1")),  # a folder, two labels
        (["0\tant/a.jpg", "2\t0/b.jpg", "1\tc.jpg"], ("ant", "1", "0")),
        (["0\t2/a.jpg", "2\tb.jpg"], ("0", "1", "2")),  # a folder named as another's number
    ],
)
def test_class_names(tmp_path: Path, rows: list[str], names: tuple[str, ...]) -> None:
    text = "".join(f"{number}\t{row}\n" for number, row in enumerate(rows))
    assert class_names(write(tmp_path / "a.lst", text)) == names


def test_counts_in_messages() -> None:
    tally = Tally(2)
    for entry in "cabd":
        tally.add(entry)
    assert (tally.count, str(tally)) == (4, "a, b and 2 more")
    assert [counted(number, "shard") for number in range(3)] == ["0 shards", "1 shard", "2 shards"]
    assert counted(1, "class is", "classes are") == "1 class is"
    assert counted(2, "class is", "classes are") == "2 classes are"
