"""Existing .rec files as sources: framed records, with classes and names from files beside them."""

import struct
from itertools import accumulate
from pathlib import Path

import pytest

from mpl_fast.data.records import MAGIC, frame, image_record
from mpl_fast.errors import DataError
from tests.packing.packs import content, keys, listed, make_records

MAGIC_WORD = struct.pack("<I", MAGIC)
ROWS = [
    (2.0, 7, b"seven"),
    (0.0, 3, b"abcd" + MAGIC_WORD * 2 + b"efgh" + MAGIC_WORD),  # four parts, two of them empty
    (2.0, 5, b""),
    (1.0, 4, b"four" * 50),
]


def test_frames_are_listed_whole(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    source, images = listed(path, tmp_path)
    state = path.stat()
    assert (source.kind, source.file) == ("records", path)
    assert (source.size, source.stamp) == (state.st_size, state.st_mtime_ns)
    by_place = sorted(images, key=lambda image: image.start)
    assert keys(by_place) == ["2/7.jpg", "0/3.jpg", "2/5.jpg", "1/4.jpg"]
    assert [content(source, image) for image in by_place] == [image_record(*row) for row in ROWS]
    assert [image.path for image in by_place] == ["7.jpg", "3.jpg", "5.jpg", "4.jpg"]
    assert source.class_order == ("0", "1", "2")
    assert source.warnings == []


def test_list_beside_the_records(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    rows = ["7\t2\tx/cat/g.JPEG", "9\t0\tant/gone.png", "3\t0\tant/c.png", "5\t2\tcat/e.jpg"]
    path.with_suffix(".lst").write_text("\n".join([*rows, "4\t1.0\tbee/d.jpg"]))
    source, images = listed(path, tmp_path)
    assert keys(images) == ["ant/c.png", "bee/d.jpg", "cat/e.jpg", "cat/g.JPEG"]
    assert [image.path for image in images] == [*keys(images)[:3], "x/cat/g.JPEG"]
    assert source.class_order == ("ant", "bee", "cat")
    # A shard has the list of all shards.
    shard = make_records(tmp_path / "train-00001-of-00002.rec", ROWS[2:])
    path.with_suffix(".lst").rename(tmp_path / "train.lst")
    source, images = listed(shard, tmp_path)
    assert keys(images) == ["bee/d.jpg", "cat/e.jpg"]
    assert source.class_order == ("ant", "bee", "cat")


def test_classes_beside_the_records(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    classes = tmp_path / "classes.txt"
    classes.write_text("ant\nbee\ncat\ndog\n")
    source, images = listed(path, tmp_path)
    assert keys(images) == ["ant/3.jpg", "bee/4.jpg", "cat/5.jpg", "cat/7.jpg"]
    assert source.class_order == ("ant", "bee", "cat", "dog")
    for text, message in (
        ("ant\nbee\n", r"a.rec: record 7 at byte 0: label 2, but only 2 classes are named"),
        ("ant\n\nbee\n", r"classes.txt: has an empty line, or a class twice"),
        ("ant\nbee\nant\n", r"classes.txt: has an empty line, or a class twice"),
    ):
        classes.write_text(text)
        with pytest.raises(DataError, match=message):
            listed(path, tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("7\t1\tb.jpg\n", "label 2, but 1 in .*a.lst, line 1"),
        ("3\t0\ta.jpg\n", "a.lst has no line for this record, or not in the order of the records"),
        ("7\t2\n", r"a.lst: line 1: .* is not `id TAB label TAB path`"),
    ],
)
def test_list_that_does_not_fit(tmp_path: Path, rows: str, message: str) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    path.with_suffix(".lst").write_text(rows)
    with pytest.raises(DataError, match=message):
        listed(path, tmp_path)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), float(1 << 24)])
def test_labels_that_are_no_class(tmp_path: Path, label: float) -> None:
    path = make_records(tmp_path / "a.rec", [(1.0, 1, b"1"), (label, 6, b"22")])
    message = r"a.rec: record 6 at byte 36: label \S+ is no whole number"
    with pytest.raises(DataError, match=message):
        listed(path, tmp_path)


def test_several_labels(tmp_path: Path) -> None:
    record = frame(struct.pack("<IfQQ2f", 2, 0, 6, 0, 1, 2) + b"image")
    (tmp_path / "a.rec").write_bytes(image_record(1, 1, b"1234") + record)
    with pytest.raises(DataError, match=r"record 6 at byte 36: 2 labels, but only one"):
        listed(tmp_path / "a.rec", tmp_path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    records = [image_record(*row) for row in ROWS]
    whole = b"".join(records)
    ends = set(accumulate(map(len, records)))
    path = tmp_path / "a.rec"
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in ends:
            assert sum(image.size for image in listed(path, tmp_path)[1]) == size
        else:
            with pytest.raises(DataError, match=r"a.rec: cut short"):
                listed(path, tmp_path)


def test_damage_is_named_with_its_place(tmp_path: Path) -> None:
    first, parts = image_record(*ROWS[0]), image_record(*ROWS[1])
    start = len(first)
    for damaged, message in (
        (first + b"\0" + parts[1:], f"damaged at byte {start}: no record begins here"),
        (first + parts[-8:], f"damaged at byte {start}|cut short at byte {start}"),
        (first + frame(b"short" * 4) + first, f"damaged at byte {start}: no image record begins"),
        (first + parts[32 + 4 :] + first, f"damaged at byte {start}: no image record begins here"),
        (first + parts[: 32 + 4] + first, f"damaged in record 3, which begins at byte {start}"),
        (b"", "no image found"),
        (b"text, not records" * 9, "damaged at byte 0: no record begins here"),
    ):
        (tmp_path / "a.rec").write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.rec: ({message})"):
            listed(tmp_path / "a.rec", tmp_path)


def test_folder_of_a_rec_file(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    with pytest.raises(DataError, match=r"a.rec:x: only an archive has folders; write .*a.rec$"):
        listed(f"{path}:x", tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds packed records; name one of its .rec files"):
        listed(f"{tmp_path}:train", tmp_path)
    with pytest.raises(DataError, match=r"no image found; of packed records, name the .rec files"):
        listed(tmp_path, tmp_path)
