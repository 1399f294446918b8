"""Images are read as they were planned: any change of a source is an error that names it."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mpl_fast.data.records import frame, image_record
from mpl_fast.errors import DataError
from mpl_fast.packing.plan.table import RecordRow, SourceRow
from mpl_fast.packing.write.reader import Reader

CLASSES = ["ant", "bee"]
MAGIC = bytes.fromhex("0a23d7ce")


def folder_row(number: int, path: Path) -> RecordRow:
    """Plan a file of its own, whose folder is source 0."""
    stat = path.stat()
    return RecordRow(number, 1, 1, path.name, 0, path.name, -1, stat.st_size, stat.st_mtime_ns)


def file_source(number: int, kind: str, path: Path) -> SourceRow:
    stat = path.stat()
    return SourceRow(number, f"{path.name}-spec", kind, str(path), stat.st_size, stat.st_mtime_ns)


def folder_source(path: Path) -> SourceRow:
    return SourceRow(0, "photos", "folder", str(path), 0, 0)


def read_all(reader: Reader, rows: list[RecordRow]) -> Iterator[tuple[RecordRow, bytes]]:
    for opened in reader.opened(rows):
        yield opened.record, reader.image(opened)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture
def photos(tmp_path: Path) -> list[RecordRow]:
    """Plan 100 files, the i-th of i bytes."""
    rows = []
    for number in range(100):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(bytes([number]) * number)
        rows.append(folder_row(number, path))
    return rows


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_files_are_read_in_order(tmp_path: Path, photos: list[RecordRow], threads: int) -> None:
    before = open_files()
    with closing(Reader([folder_source(tmp_path)], CLASSES, threads)) as reader:
        images = list(read_all(reader, photos))
        reader.require_unchanged()
    assert images == [(row, bytes([row.id]) * row.id) for row in photos]
    assert open_files() == before


@pytest.mark.parametrize("threads", [0, 5])
def test_what_was_opened_ahead_is_closed(
    tmp_path: Path, photos: list[RecordRow], threads: int
) -> None:
    before = open_files()
    with closing(Reader([folder_source(tmp_path)], CLASSES, threads)) as reader:
        assert next(iter(reader.opened(photos))).record.id == 0
    assert open_files() == before


@pytest.mark.parametrize("threads", [0, 2])
def test_ranges_of_several_files(tmp_path: Path, threads: int) -> None:
    (tmp_path / "a.tar").write_bytes(b"----first-third")
    (tmp_path / "b.tar").write_bytes(b"second")
    (tmp_path / "own.jpg").write_bytes(b"fourth")
    sources = [
        folder_source(tmp_path),
        file_source(1, "archive", tmp_path / "a.tar"),
        file_source(2, "archive", tmp_path / "b.tar"),
    ]
    places = [(1, 4, 5), (2, 0, 6), (1, 10, 5), (2, 6, 0)]
    rows = [
        RecordRow(number, 0, 1, "x.jpg", source, "in/x.jpg", start, size, 0)
        for number, (source, start, size) in enumerate(places)
    ]
    rows.append(folder_row(9, tmp_path / "own.jpg"))
    with closing(Reader(sources, CLASSES, threads)) as reader:
        images = [image for _, image in read_all(reader, rows)]
        reader.require_unchanged()
    assert images == [b"first", b"second", b"third", b"", b"fourth"]


def test_images_are_filled_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"--abcdefgh--")
    row = RecordRow(0, 0, 1, "x.jpg", 0, "in/x.jpg", 2, 8, 0)
    pieces = [bytearray(3), bytearray(1), bytearray(4)]
    source = file_source(0, "archive", tmp_path / "a.tar")
    with closing(Reader([source], CLASSES, 0)) as reader:
        for opened in reader.opened([row]):
            reader.fill(opened, [memoryview(piece) for piece in pieces])
    assert pieces == [b"abc", b"d", b"efgh"]


def test_reads_may_be_short(
    tmp_path: Path, photos: list[RecordRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of network file systems."""
    real_read = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, start: real_read(file, [views[0][:7]], start)
    )
    with closing(Reader([folder_source(tmp_path)], CLASSES, 0)) as reader:
        images = list(read_all(reader, photos))
    assert images == [(row, bytes([row.id]) * row.id) for row in photos]


def test_records_lose_their_frames(tmp_path: Path) -> None:
    cut = b"abcd" + MAGIC * 2 + b"e"
    framed = [
        image_record(7, 3, b"hello"),
        image_record(8, 4, cut),
        frame(b"\2" + bytes(23) + b"8 bytes." + b"labels"),
        image_record(9, 5, b""),
    ]
    (tmp_path / "x.rec").write_bytes(b"".join(framed))
    rows, start = [], 0
    for number, record in enumerate(framed):
        rows.append(RecordRow(number, 0, 1, f"{number}", 0, f"{number}", start, len(record), 0))
        start += len(record)
    source = file_source(0, "records", tmp_path / "x.rec")
    with closing(Reader([source], CLASSES, 2)) as reader:
        images = [image for _, image in read_all(reader, rows[::-1])]
    assert images == [b"", b"labels", cut, b"hello"]


@pytest.mark.parametrize(
    ("start", "size", "message"),
    [
        (4, 40, "not a record"),
        (0, 44, "it has 44 bytes, its parts 40"),
        (40, 16, "no image record: 5 bytes"),
    ],
)
def test_a_source_record_that_is_none(tmp_path: Path, start: int, size: int, message: str) -> None:
    (tmp_path / "x.rec").write_bytes(image_record(7, 3, b"hello") + frame(b"short"))
    row = RecordRow(0, 1, 1, "3", 0, "3", start, size, 0)
    source = file_source(0, "records", tmp_path / "x.rec")
    with (
        closing(Reader([source], CLASSES, 0)) as reader,
        pytest.raises(DataError, match=f"bee/3: x.rec-spec: 3: .*{message}"),
    ):
        list(read_all(reader, [row]))


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grown", "50.jpg changed while it was being packed"),
        ("shrunk", "50.jpg changed while it was being packed"),
        ("touched", "50.jpg changed while it was being packed"),
        ("gone", "50.jpg: No such file or directory; it was there when planned"),
        ("a folder", "50.jpg: Is a directory"),
    ],
)
def test_a_file_that_changed(
    tmp_path: Path, photos: list[RecordRow], change: str, message: str, threads: int
) -> None:
    path = tmp_path / "50.jpg"
    if change == "grown":
        path.write_bytes(path.read_bytes() + b"!")
        os.utime(path, ns=(0, photos[50].stamp))
    elif change == "shrunk":
        path.write_bytes(path.read_bytes()[:-1])
        os.utime(path, ns=(0, photos[50].stamp))
    elif change == "touched":
        os.utime(path, ns=(0, photos[50].stamp + 1))
    else:
        path.unlink()
        if change == "a folder":
            path.mkdir()
    before = open_files()
    done = []
    with (
        closing(Reader([folder_source(tmp_path)], CLASSES, threads)) as reader,
        pytest.raises(DataError, match=f"^bee/50.jpg: {tmp_path}/{message}"),
    ):
        for row, _ in read_all(reader, photos):
            done.append(row)
    assert done[:8] == photos[:8]
    assert done == photos[: len(done)]
    assert len(done) <= 50
    assert open_files() == before


def test_a_file_that_grows_while_it_is_open(tmp_path: Path, photos: list[RecordRow]) -> None:
    with closing(Reader([folder_source(tmp_path)], CLASSES, 0)) as reader:
        records = iter(reader.opened(photos))
        for _ in range(50):
            next(records)
        opened = next(records)
        (tmp_path / "50.jpg").write_bytes(b"another image, and a longer one than before")
        with pytest.raises(DataError, match=r"bee/50\.jpg: .*50\.jpg changed while it was"):
            reader.image(opened)


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_archive_that_changed(tmp_path: Path, change: str, when: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"image")
    source = file_source(0, "archive", path)
    row = RecordRow(0, 1, 1, "x.jpg", 0, "in/x.jpg", 0, 5, 0)
    message = "a.tar changed while it was being packed"

    def alter() -> None:
        if change == "grown":
            path.write_bytes(b"image!")
            os.utime(path, ns=(0, source.stamp))
        elif change == "touched":
            os.utime(path, ns=(0, source.stamp - 1))
        else:
            path.unlink()

    with closing(Reader([source], CLASSES, 0)) as reader:
        if when == "before":
            alter()
            if change == "gone":
                message = "a.tar: No such file or directory"
            with pytest.raises(DataError, match=f"^a.tar-spec: .*{message}"):
                list(read_all(reader, [row]))
            return
        assert [image for _, image in read_all(reader, [row])] == [b"image"]
        alter()
        if change == "gone":  # it was read to its end all the same
            reader.require_unchanged()
            return
        with pytest.raises(DataError, match=f"^a.tar-spec: .*{message}"):
            reader.require_unchanged()


def test_a_range_past_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"image")
    row = RecordRow(0, 1, 1, "x.jpg", 0, "in/x.jpg", 2, 4, 0)
    source = file_source(0, "archive", tmp_path / "a.tar")
    with (
        closing(Reader([source], CLASSES, 0)) as reader,
        pytest.raises(DataError, match=r"bee/x\.jpg: a\.tar-spec: in/x\.jpg changed"),
    ):
        list(read_all(reader, [row]))


def test_names_of_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 \t'\n\".jpg")
    path.write_bytes(b"image")
    with closing(Reader([folder_source(tmp_path)], CLASSES, 2)) as reader:
        assert list(read_all(reader, [folder_row(0, path)])) == [(folder_row(0, path), b"image")]
