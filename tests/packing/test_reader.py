"""Images are read as planned; an error names every source that changed since."""

import os
from collections.abc import Iterator
from contextlib import closing
from itertools import accumulate, islice
from pathlib import Path
from threading import get_ident

import pytest

from mpl_fast.data.records import frame, image_record
from mpl_fast.errors import DataError
from mpl_fast.packing.plan.table import RecordRow, SourceRow
from mpl_fast.packing.write.reader import Reader
from tests.packing.packs import CLASSES, MAGIC, files, folder, one_file, own_file

ARCHIVED = RecordRow(0, 1, 1, "x.jpg", 0, "in/x.jpg", 0, 5, 0)
CHANGED = "changed while it was being packed"
IMAGES = [bytes([number]) * number for number in range(100)]


def opened(sources: list[SourceRow], threads: int = 0) -> closing[Reader]:
    return closing(Reader(sources, list(CLASSES), threads))


def read_all(reader: Reader, rows: list[RecordRow]) -> Iterator[tuple[RecordRow, bytes]]:
    for record in reader.opened(rows):
        yield record.record, reader.image(record)


def read(sources: list[SourceRow], rows: list[RecordRow], threads: int = 0) -> list[bytes]:
    """Return the images of rows, read in this order."""
    with opened(sources, threads) as reader:
        pairs = list(read_all(reader, rows))
        reader.require_unchanged()
    assert [row for row, _ in pairs] == rows
    return [image for _, image in pairs]


def archive(tmp_path: Path, content: bytes, name: str = "a.tar", number: int = 0) -> SourceRow:
    (tmp_path / name).write_bytes(content)
    return one_file("archive", tmp_path / name, number)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture(autouse=True)
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads open files, where there are threads."""
    monkeypatch.setattr("mpl_fast.packing.write.reader._SLOW", 0.0)


@pytest.fixture
def photos(tmp_path: Path) -> list[RecordRow]:
    """Plan 100 files, the i-th of i bytes."""
    return files(tmp_path, IMAGES)[1]


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_files(tmp_path: Path, photos: list[RecordRow], threads: int) -> None:
    """Files are read in order; those opened ahead are closed when reading ends early."""
    before = open_files()
    assert read([folder(tmp_path)], photos, threads) == IMAGES
    assert open_files() == before
    with opened([folder(tmp_path)], threads) as reader:
        assert next(iter(reader.opened(photos))).record == photos[0]
    assert open_files() == before


@pytest.mark.parametrize(("slow", "here"), [(0.0, 8), (float("inf"), 100)])
def test_threads_open_files_of_slow_disks_only(
    tmp_path: Path,
    photos: list[RecordRow],
    monkeypatch: pytest.MonkeyPatch,
    slow: float,
    here: int,
) -> None:
    """The first batch is opened in place: by its time the others are opened."""
    monkeypatch.setattr("mpl_fast.packing.write.reader._SLOW", slow)
    openers = []
    advise = os.posix_fadvise

    def recorded(*what: int) -> None:
        openers.append(get_ident())
        advise(*what)

    monkeypatch.setattr(os, "posix_fadvise", recorded)
    assert read([folder(tmp_path)], photos, threads=2) == IMAGES
    assert openers.count(get_ident()) == here
    assert len(openers) == 100


@pytest.mark.parametrize("threads", [0, 2])
def test_ranges_of_several_files(tmp_path: Path, threads: int) -> None:
    own = tmp_path / os.fsdecode(b"caf\xe9 \t'\n\".jpg")
    own.write_bytes(b"fourth")
    sources = [
        folder(tmp_path),
        archive(tmp_path, b"----first-third", number=1),
        archive(tmp_path, b"second", "b.tar", number=2),
    ]
    places = [(1, 4, 5), (2, 0, 6), (1, 10, 5), (2, 6, 0)]
    rows = [
        ARCHIVED._replace(id=number, source=source, start=start, size=size)
        for number, (source, start, size) in enumerate(places)
    ]
    rows.append(own_file(9, own))
    assert read(sources, rows, threads) == [b"first", b"second", b"third", b"", b"fourth"]


def test_images_are_filled_into_pieces(tmp_path: Path) -> None:
    pieces = [bytearray(3), bytearray(1), bytearray(4)]
    with opened([archive(tmp_path, b"--abcdefgh--")]) as reader:
        for record in reader.opened([ARCHIVED._replace(start=2, size=8)]):
            reader.fill(record, [memoryview(piece) for piece in pieces])
    assert pieces == [b"abc", b"d", b"efgh"]


def test_short_reads(
    tmp_path: Path, photos: list[RecordRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may return fewer bytes than requested."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:7]], at))
    assert read([folder(tmp_path)], photos) == IMAGES


def test_records_without_their_frames(tmp_path: Path) -> None:
    multipart = b"abcd" + MAGIC * 2 + b"e"
    framed = [
        image_record(7, 3, b"hello"),
        image_record(8, 4, multipart),
        frame(b"\2" + bytes(23) + b"8 bytes." + b"labels"),
        image_record(9, 5, b""),
    ]
    (tmp_path / "x.rec").write_bytes(b"".join(framed))
    rows = [
        ARCHIVED._replace(id=end, start=end - len(record), size=len(record))
        for record, end in zip(framed, accumulate(map(len, framed)), strict=True)
    ]
    source = one_file("records", tmp_path / "x.rec")
    assert read([source], rows[::-1], threads=2) == [b"", b"labels", multipart, b"hello"]


@pytest.mark.parametrize(
    ("kind", "start", "size", "message"),
    [
        ("records", 4, 40, ": .*not a record"),
        ("records", 0, 44, ": .*it has 44 bytes, its parts 40"),
        ("records", 40, 16, ": .*no image record: 5 bytes"),
        ("archive", 40, 40, f" {CHANGED}"),  # past the end
    ],
)
def test_ranges_that_hold_no_image(
    tmp_path: Path, kind: str, start: int, size: int, message: str
) -> None:
    (tmp_path / "x.rec").write_bytes(image_record(7, 3, b"hello") + frame(b"short"))
    row = RecordRow(0, 1, 1, "3", 0, "3", start, size, 0)
    with pytest.raises(DataError, match=f"bee/3: x.rec: 3{message}"):
        read([one_file(kind, tmp_path / "x.rec")], [row])


def change_file(path: Path, change: str, stamp: int) -> None:
    """Change a file; where its size changes, its time stamp stays."""
    if change == "touched":
        os.utime(path, ns=(0, stamp + 1))
    elif change in ("gone", "a folder"):
        path.unlink()
        if change == "a folder":
            path.mkdir()
    else:
        content = path.read_bytes()
        path.write_bytes(content + b"!" if change == "grown" else content[:-1])
        os.utime(path, ns=(0, stamp))


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grown", CHANGED),
        ("shrunk", CHANGED),
        ("touched", CHANGED),
        ("gone", "No such file or directory; it was there when planned"),
        ("a folder", "Is a directory"),
    ],
)
def test_a_file_that_changed(
    tmp_path: Path, photos: list[RecordRow], change: str, message: str, threads: int
) -> None:
    change_file(tmp_path / "50.jpg", change, photos[50].stamp)
    before = open_files()
    done = []
    with (
        opened([folder(tmp_path)], threads) as reader,
        pytest.raises(DataError, match=f"^cat/50.jpg: {tmp_path}/50.jpg:? {message}"),
    ):
        for row, _ in read_all(reader, photos):
            done.append(row)
    assert 8 <= len(done) <= 50
    assert done == photos[: len(done)]
    assert open_files() == before


def test_a_file_that_grows_while_it_is_open(tmp_path: Path, photos: list[RecordRow]) -> None:
    with opened([folder(tmp_path)]) as reader:
        record = next(islice(reader.opened(photos), 50, None))
        (tmp_path / "50.jpg").write_bytes(b"another image, and a longer one than before")
        with pytest.raises(DataError, match=rf"cat/50\.jpg: .*50\.jpg {CHANGED}"):
            reader.image(record)


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_archive_that_changed(tmp_path: Path, change: str, when: str) -> None:
    source = archive(tmp_path, b"image")
    message = "a.tar: No such file or directory" if change == "gone" else f"a.tar {CHANGED}"
    with opened([source]) as reader:
        if when == "after":
            assert list(read_all(reader, [ARCHIVED])) == [(ARCHIVED, b"image")]
        change_file(tmp_path / "a.tar", change, source.stamp)
        if (change, when) == ("gone", "after"):  # it was read to its end all the same
            reader.require_unchanged()
            return
        with pytest.raises(DataError, match=f"^a.tar: .*{message}"):
            if when == "before":
                list(read_all(reader, [ARCHIVED]))
            else:
                reader.require_unchanged()
