"""A shard: the records of a plan one after another, from every kind of source."""

import hashlib
import os
import zlib
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from mpl_fast.data.records import IMAGE_LIMIT, frame, image_record, is_multipart
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow
from mpl_fast.packing.write.pool import StoppedError
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt
from mpl_fast.packing.write.shard_writer import BUFFER
from tests.packing.packs import (
    FIRST_ID,
    MAGIC,
    SHARD,
    files,
    folder,
    make_table,
    one_file,
    own_file,
)

UNCHECKED = ImageOptions(check="none")
HEAD = 32  # bytes before an image


def jpeg(number: int, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def records_of(images: list[bytes]) -> list[bytes]:
    """Return the records of images, with the ids and labels of make_table."""
    return [
        image_record(number % 3, FIRST_ID + number, image) for number, image in enumerate(images)
    ]


def plan(tmp_path: Path, images: list[bytes]) -> Path:
    """Plan a shard of files; return the work folder."""
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    return tmp_path / "work"


def write(
    work: Path, image_options: ImageOptions = UNCHECKED, threads: int = 0, most: int = 1 << 60
) -> tuple[ShardReceipt, list[int]]:
    """Write the shard; return its receipt and the sizes that it advanced by."""
    sizes: list[int] = []

    def advance(images: int, size: int) -> None:
        sizes.append(size)
        if len(sizes) >= most:
            raise StoppedError

    return write_shard(work, 0, image_options, threads, advance), sizes


def require_whole(work: Path, done: ShardReceipt, images: list[bytes]) -> None:
    """Check the shard and its receipt against all planned images."""
    content = (work / SHARD).read_bytes()
    records = records_of(images)
    assert content == b"".join(records)
    assert (done.file, done.content, done.stamps) == (SHARD, "what", "when")
    assert (done.size, done.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert done.multipart == sum(map(is_multipart, records))
    assert done.ids.tolist() == list(range(FIRST_ID, FIRST_ID + len(images)))
    assert done.lengths.tolist() == list(map(len, records))
    assert done.offsets.tolist() == [sum(map(len, records[:at])) for at in range(len(records))]
    assert done.sizes.tolist() == list(map(len, images))
    assert done.crc32.tolist() == list(map(zlib.crc32, images))
    require_saved(work, done)
    assert sorted(path.name for path in work.iterdir()) == [TABLE, SHARD, f"{SHARD}.done"]


def require_saved(work: Path, done: ShardReceipt) -> None:
    saved = ShardReceipt.load(work / f"{SHARD}.done")
    for field in fields(ShardReceipt):
        assert np.array_equal(getattr(saved, field.name), getattr(done, field.name)), field.name


def require_nothing_written(work: Path) -> None:
    assert [path.name for path in work.iterdir()] == [TABLE]


def remarks_of(done: ShardReceipt) -> list[tuple[int, str]]:
    assert all(remark.reason for remark in done.remarks)
    return [(remark.id - FIRST_ID, remark.action) for remark in done.remarks]


@pytest.mark.parametrize("threads", [0, 3])
def test_files(tmp_path: Path, threads: int) -> None:
    images = [bytes([number]) * number for number in range(1, 41)]
    images[20:23] = [MAGIC, b"abcd" + MAGIC * 2 + b"e", b"abc" + MAGIC]
    work = plan(tmp_path, images)
    done, sizes = write(work, threads=threads)
    require_whole(work, done, images)
    assert sizes == list(map(len, images))
    assert (done.bytes_in, done.multipart) == (sum(sizes), 2)
    assert (done.reencoded, done.rotated, done.remarks) == (0, 0, [])


def test_sources_of_every_kind(tmp_path: Path) -> None:
    """Labels and ids are those of the plan, never those of the source's records."""
    multipart = b"abcd" + MAGIC + b"efg"
    framed = [
        image_record(99, 1, b"whole"),
        image_record(98, 2, multipart),
        frame(b"\2" + bytes(23) + b"8 bytes." + b"labels"),
    ]
    (tmp_path / "x.rec").write_bytes(b"".join(framed))
    (tmp_path / "x.tar").write_bytes(b"....in tar..")
    (tmp_path / "0.jpg").write_bytes(b"own file")
    sources = [
        folder(tmp_path),
        one_file("records", tmp_path / "x.rec", 1),
        one_file("archive", tmp_path / "x.tar", 2),
    ]
    first, second, third = map(len, framed)
    places = [(1, first, second), (2, 4, 6), (1, 0, first), (1, first + second, third)]
    rows = [own_file(0, tmp_path / "0.jpg")]
    for number, (source, start, size) in enumerate(places, 1):
        rows.append(RecordRow(FIRST_ID + number, number % 3, 0, "x", source, "x", start, size, 0))
    make_table(tmp_path / "work", sources, rows)
    done, sizes = write(tmp_path / "work")
    require_whole(tmp_path / "work", done, [b"own file", multipart, b"in tar", b"whole", b"labels"])
    assert sizes == [8, second, 6, first, third]
    assert done.bytes_in == sum(sizes)


@pytest.mark.parametrize("before", [-36, -32, -28, -24, -4, 0, 4, 40])
@pytest.mark.parametrize("inside", [b"", MAGIC])
def test_records_at_the_border_of_buffers(tmp_path: Path, before: int, inside: bytes) -> None:
    """The border is inside or at an end of frame, header or image, where a magic word may be."""
    first = b"a" * (BUFFER - 2 * HEAD - before)  # the next image begins `before` the border
    images = [first, b"z" * max(0, before) + inside + b"tail!", b"after"]
    work = plan(tmp_path, images)
    done, _ = write(work)
    require_whole(work, done, images)
    assert done.offsets[1] + HEAD == BUFFER - before
    assert done.multipart == bool(inside)


@pytest.mark.parametrize("size", [2 * BUFFER + 5, 3 * BUFFER - HEAD, 3 * BUFFER, 5 * BUFFER + 1])
@pytest.mark.slow
def test_images_longer_than_buffers(tmp_path: Path, size: int) -> None:
    """Images as long as the whole ring of buffers and longer, of one part and of several."""
    noise = np.random.default_rng(0).bytes(size)
    images = [b"before", noise, b"between", noise[:-99] + MAGIC * 20 + noise[-19:], b"after"]
    work = plan(tmp_path, images)
    done, _ = write(work, threads=2)
    require_whole(work, done, images)


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_bad_images(tmp_path: Path, on_bad: str) -> None:
    """Skipped images leave a gap in the ids; where a bad one is an error, all are listed."""
    images = [jpeg(number) for number in range(6)]
    images[1] = b"no image"
    images[5] = images[5][: len(images[5]) // 2]
    work = plan(tmp_path, images)
    done, sizes = write(work, ImageOptions(on_bad=on_bad))
    assert sizes == list(map(len, images))
    if on_bad == "fail":
        assert remarks_of(done) == [(1, "failed"), (5, "failed")]
        require_nothing_written(work)
        return
    assert remarks_of(done) == [(1, "skipped"), (5, "skipped")]
    kept = [0, 2, 3, 4]
    records = records_of(images)
    assert (work / SHARD).read_bytes() == b"".join(records[number] for number in kept)
    assert done.ids.tolist() == [FIRST_ID + number for number in kept]
    assert done.bytes_in == sum(sizes)
    require_saved(work, done)


def test_a_shard_without_any_image_left(tmp_path: Path) -> None:
    work = plan(tmp_path, [b"no image", b"nor this"])
    message = r"^train\.rec: all its images are skipped.*repair the images"
    with pytest.raises(DataError, match=message):
        write(work, ImageOptions(on_bad="skip"))
    require_nothing_written(work)


def test_new_images_are_written_and_counted(tmp_path: Path) -> None:
    png = cv2.imencode(".png", np.zeros((9, 7, 3), np.uint8))[1].tobytes()
    images = [jpeg(0, 40, 60), jpeg(1, 16, 24), png]
    work = plan(tmp_path, images)
    done, _ = write(work, ImageOptions(short_side=20, on_bad="convert"))
    content = (work / SHARD).read_bytes()
    written = [
        content[start + HEAD :][:size]
        for start, size in zip(done.offsets.tolist(), done.sizes.tolist(), strict=True)
    ]
    assert content == b"".join(records_of(written))
    shapes = [simplejpeg.decode_jpeg_header(image)[:2] for image in written]
    assert shapes == [(20, 30), (16, 24), (9, 7)]
    assert written[1] == images[1]
    assert done.crc32.tolist() == list(map(zlib.crc32, written))
    assert (done.reencoded, done.rotated, done.bytes_in) == (2, 0, sum(map(len, images)))
    assert remarks_of(done) == [(2, "converted")]


@pytest.mark.parametrize("size", [IMAGE_LIMIT + 1, 3 << 30])
@pytest.mark.parametrize(("on_bad", "action"), [("fail", "failed"), ("skip", "skipped")])
def test_an_image_too_large_for_a_record(
    tmp_path: Path, size: int, on_bad: str, action: str
) -> None:
    source, rows = files(tmp_path / "src", [b"first", b"large", b"last"])
    with (tmp_path / "src" / "1.jpg").open("wb") as file:
        file.truncate(size)  # without blocks on disk
    rows[1] = own_file(1, tmp_path / "src" / "1.jpg")
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work", ImageOptions(check="none", on_bad=on_bad))
    reason = f"{size} bytes are too many, a record holds {IMAGE_LIMIT}"
    assert done.remarks == [Remark(FIRST_ID + 1, reason, action)]
    assert done.ids.tolist() == [FIRST_ID, FIRST_ID + 2]
    assert (tmp_path / "work" / SHARD).exists() == (on_bad == "skip")


@pytest.mark.parametrize("threads", [0, 2])
def test_a_changed_source_leaves_nothing(tmp_path: Path, threads: int) -> None:
    work = plan(tmp_path, [b"first", b"second"])
    path = tmp_path / "src" / "1.jpg"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"^bee/1\.jpg: .*1\.jpg changed while it was being packed"):
        write(work, threads=threads)
    require_nothing_written(work)


def test_an_archive_that_changes_after_its_last_image(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"image")
    row = RecordRow(FIRST_ID, 0, 1, "x.jpg", 0, "in/x.jpg", 0, 5, 0)
    make_table(tmp_path / "work", [one_file("archive", tmp_path / "x.tar")], [row])

    def advance(images: int, size: int) -> None:
        (tmp_path / "x.tar").write_bytes(b"other")
        os.utime(tmp_path / "x.tar", ns=(0, 1))

    with pytest.raises(DataError, match=r"^x\.tar: .*x\.tar changed while it was being packed"):
        write_shard(tmp_path / "work", 0, UNCHECKED, 0, advance)
    require_nothing_written(tmp_path / "work")


@pytest.mark.parametrize("threads", [0, 2])
def test_interrupted_runs(tmp_path: Path, threads: int) -> None:
    """A stop leaves no file; files of a killed run are replaced."""
    images = [b"first", b"x" * (2 * BUFFER), b"third"]
    work = plan(tmp_path, images)
    with pytest.raises(StoppedError):
        write(work, threads=threads, most=2)
    require_nothing_written(work)
    done, _ = write(work, threads=threads)
    require_whole(work, done, images)
    for name in (SHARD, f"{SHARD}.tmp", f"{SHARD}.done", f"{SHARD}.done.tmp"):
        (work / name).write_bytes(bytes(3 * BUFFER))
    done, _ = write(work, threads=threads)
    require_whole(work, done, images)
