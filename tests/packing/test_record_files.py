"""Existing .rec files as sources: framed records, with classes and names from files beside them."""

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest

from mpl_fast.data.records import MAGIC, frame, image_record
from mpl_fast.errors import DataError
from mpl_fast.packing.sources.record_files import read_frames
from tests.packing.made_sources import content, keys, listed, opened
from tests.packing.packs import jpeg, make_records, pack, read_split, refuse, run, with_magic

MAGIC_WORD = struct.pack("<I", MAGIC)
ROWS = [
    (2.0, 7, b"seven"),
    (0.0, 3, b"abcd" + MAGIC_WORD * 2 + b"efgh" + MAGIC_WORD),  # four parts, two of them empty
    (2.0, 5, b""),
    (1.0, 4, b"four" * 50),
]


def labeled(labels: Sequence[float], number: int, image: bytes = b"image") -> bytes:
    """Return the record that MXNet's recordio.pack makes of an array of labels."""
    header = struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0, number, 0, *labels)
    return frame(header + image)


# InsightFace's: of images 1 and 2 of one person and 3 of another.
HEADERS = b"".join(labeled(*row, b"") for row in (([4, 6], 0), ([1, 3], 4), ([3, 4], 5)))
FIRST, PARTS = image_record(*ROWS[0]), image_record(*ROWS[1])


def test_frames_are_listed_whole(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    source, images = listed(path, tmp_path)
    assert [frame.image for frame in read_frames(path)] == [len(row[2]) for row in ROWS]
    state = path.stat()
    assert (source.kind, source.file) == ("records", path)
    assert (source.size, source.stamp) == (state.st_size, state.st_mtime_ns)
    by_place = sorted(images, key=lambda image: image.start)
    assert keys(by_place) == ["2/7.jpg", "0/3.jpg", "2/5.jpg", "1/4.jpg"]
    stored = [content(source, image) for image in by_place]
    assert stored == [image_record(*row) for row in ROWS]
    assert [source.decode(record) for record in stored] == [row[2] for row in ROWS]
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
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    source, images = listed(path, tmp_path)
    assert keys(images) == ["ant/3.jpg", "bee/4.jpg", "cat/5.jpg", "cat/7.jpg"]
    assert source.class_order == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize(
    ("beside", "text", "message"),
    [
        ("classes.txt", "ant\nbee\n", "a.rec: .* at byte 0: label 2, but only 2 classes are named"),
        ("classes.txt", "ant\n\nbee\n", "classes.txt: has an empty line, or a class twice"),
        ("classes.txt", "ant\nb/e\ncat\n", "classes.txt: a class name has no /: b/e"),
        ("classes.txt", "ant\nbee\nant\n", "classes.txt: has an empty line, or a class twice"),
        ("a.lst", "7\t1\tb.jpg\n", "label 2, but 1 in .*a.lst, line 1"),
        ("a.lst", "3\t0\ta.jpg\n", "a.lst has no line for this record, or not in the order of"),
        ("a.lst", "7\t2\n", "a.lst: line 1: .* is not `id TAB label TAB path`"),
    ],
)
def test_files_beside_that_do_not_fit(tmp_path: Path, beside: str, text: str, message: str) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    (tmp_path / beside).write_text(text)
    with pytest.raises(DataError, match=message):
        listed(path, tmp_path)


def test_classes_that_cannot_be_read(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", ROWS)
    (tmp_path / "classes.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"classes.txt: Input/output error"):
        listed(path, tmp_path)


@pytest.mark.parametrize("label", [-2.0, 0.5, float("nan"), float("inf"), float(1 << 24)])
def test_labels_that_are_no_class(tmp_path: Path, label: float) -> None:
    path = make_records(tmp_path / "a.rec", [(1.0, 1, b"1"), (label, 6, b"22")])
    message = r"a.rec: record 6 at byte 36: label \S+ is no whole number"
    with pytest.raises(DataError, match=message):
        listed(path, tmp_path)


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


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (FIRST + b"\0" + PARTS[1:], f"damaged at byte {len(FIRST)}: no image record begins here"),
        (FIRST + PARTS[-8:], f"damaged at byte {len(FIRST)}: no image record begins here"),
        (FIRST + frame(b"short" * 4) + FIRST, f"damaged at byte {len(FIRST)}: no image record"),
        (FIRST + PARTS[36:] + FIRST, f"damaged at byte {len(FIRST)}: no image record begins here"),
        (
            FIRST + PARTS[:36] + FIRST,
            f"damaged at byte {len(FIRST) + 36}: in the record that begins at byte {len(FIRST)}",
        ),
        (b"", "no image found"),
        (b"text, not records" * 9, "damaged at byte 0: no image record begins here"),
        (
            frame(struct.pack("<IfQQ2f", 2, 0, 6, 0, 1, 2) + b"image"),
            "record 6 at byte 0: 2 labels, but only one can be packed",
        ),
        (labeled([1, 1], 6), "record 6 at byte 0: 2 labels, but only one can be packed"),
        (HEADERS + labeled([1, 2], 6), "record 6 at byte .*: 2 labels, but only one can be"),
        (HEADERS + labeled([1, 0, 1], 6), "record 6 at byte .*: 3 labels, but only one can be"),
        (
            frame(struct.pack("<IfQQ", 1, 0, 6, 0)),
            "record 6 at byte 0: too short for the 1 labels that its header counts",
        ),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, damaged: bytes, message: str) -> None:
    (tmp_path / "a.rec").write_bytes(damaged)
    with pytest.raises(DataError, match=f"a.rec: {message}"):
        listed(tmp_path / "a.rec", tmp_path)


def test_an_array_of_one_label_is_a_label(tmp_path: Path) -> None:
    images = {"0/1.jpg": with_magic(jpeg(1)), "1/2.jpg": jpeg(2)}
    rows = [labeled([at], at + 1, image) for at, image in enumerate(images.values())]
    (tmp_path / "a.rec").write_bytes(b"".join(rows))
    out = pack("--src", tmp_path / "a.rec", "--labeled", 2, out=tmp_path / "out")
    assert {key: image for _, _, key, image in read_split(out, "train")} == images


@pytest.mark.parametrize("second", [None, 0.0, 1.0])
@pytest.mark.parametrize("first", [False, True])
def test_insightface(tmp_path: Path, second: float | None, first: bool) -> None:
    """Its headers are left out, wherever they are, and its list is not MXNet's."""
    labels = [[0.0], [0.0], [1.0]] if second is None else [[0, second], [0, second], [1, second]]
    rows = [labeled(some, at, jpeg(at)) for at, some in enumerate(labels, 1)]
    records = [HEADERS, *rows] if first else [*rows, HEADERS]
    path, lines = tmp_path / "train.rec", list[str]()
    path.write_bytes(b"".join(records))
    (tmp_path / "train.lst").write_text("".join(f"1\t/faces/{at}.jpg\t0\n" for at in range(3)))
    source = opened(path, tmp_path, report=lines.append)
    found = sorted(source.images())
    assert keys(found) == ["0/1.jpg", "0/2.jpg", "1/3.jpg"]
    assert [source.decode(content(source, one)) for one in found] == [jpeg(at) for at in (1, 2, 3)]
    fault = "3 records have several labels and no image, as InsightFace's headers: left out"
    assert source.warnings == [f"{path}: {fault}"]
    printed = [f"{path}: {tmp_path}/train.lst is a list of InsightFace, not of MXNet: not read"]
    if second is not None:
        of = "images have two labels, as InsightFace's; the first is taken for the class"
        printed.append(f"{path}: {of}")
    assert lines == printed
    pool = opened(path, tmp_path, unlabeled=True)
    assert len(list(pool.images())) == 3
    assert pool.warnings == source.warnings


def test_empty_image_with_one_label_is_a_bad_image(tmp_path: Path) -> None:
    rows = [image_record(0, 0, jpeg(0)), image_record(1, 1, jpeg(1)), labeled([1], 2, b"")]
    (tmp_path / "a.rec").write_bytes(b"".join(rows))
    arguments = ("--src", tmp_path / "a.rec", "--labeled", 2, "--out", tmp_path / "out")
    assert "2.jpg: empty file" in refuse(*arguments, status=4)


def test_equal_ids_are_named_as_the_reason(tmp_path: Path) -> None:
    path = make_records(tmp_path / "a.rec", [(at % 2, 0, jpeg(at)) for at in range(4)])
    arguments = ("--src", path, "--labeled", 2, "--out", tmp_path / "out")
    remedy = f"number the records, or name them in {tmp_path}/a.lst (`id TAB label TAB name`)"
    reason = f"0.jpg; these are the ids of records, and equal: {remedy}"
    assert refuse(*arguments, status=4).endswith(reason)
    path.with_suffix(".lst").write_text("".join(f"0\t{at % 2}\tx/{at}.jpg\n" for at in range(4)))
    assert "train: 4 records" in run("pack", *arguments).stdout
