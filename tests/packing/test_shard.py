"""A shard has the bytes of its records one after another, from every kind of source."""

import hashlib
import os
import zlib
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from tests.packing.shard_table import FIRST_ID, SHARD, files, folder, make_table, one_file, own_file

from mpl_fast.data.records import IMAGE_LIMIT, frame, image_record, is_multipart
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow
from mpl_fast.packing.write.pool import StoppedError
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt
from mpl_fast.packing.write.shard_writer import BUFFER

MAGIC = bytes.fromhex("0a23d7ce")
UNCHECKED = ImageOptions(check="none")
HEAD = 32  # bytes before an image


def jpeg(number: int, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def expected(images: list[bytes]) -> bytes:
    """Return the file of all images in order, with the labels of shard_table."""
    return b"".join(
        image_record(number % 3, FIRST_ID + number, image) for number, image in enumerate(images)
    )


def write(
    work: Path, image_options: ImageOptions = UNCHECKED, threads: int = 0, most: int = 1 << 60
) -> tuple[ShardReceipt, list[int]]:
    """Write the shard; return what is told of it and the sizes that it advanced by."""
    sizes: list[int] = []

    def advance(images: int, size: int) -> None:
        sizes.append(size)
        if len(sizes) >= most:
            raise StoppedError

    return write_shard(work, 0, image_options, threads, advance), sizes


def require_whole(work: Path, done: ShardReceipt, images: list[bytes]) -> None:
    """Check the file and all that is told of it against images, none of which is left out."""
    content = (work / SHARD).read_bytes()
    records = [
        image_record(number % 3, FIRST_ID + number, image) for number, image in enumerate(images)
    ]
    assert content == b"".join(records)
    assert (done.file, done.content, done.stamps) == (SHARD, "what", "when")
    assert (done.size, done.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert done.multipart == sum(map(is_multipart, records))
    assert done.ids.tolist() == list(range(FIRST_ID, FIRST_ID + len(images)))
    assert done.lengths.tolist() == list(map(len, records))
    starts = [sum(map(len, records[:number])) for number in range(len(records))]
    assert done.offsets.tolist() == starts
    assert done.sizes.tolist() == list(map(len, images))
    assert done.crc32.tolist() == list(map(zlib.crc32, images))
    require_equal(ShardReceipt.load(work / f"{SHARD}.done"), done)
    assert sorted(path.name for path in work.iterdir()) == [TABLE, SHARD, f"{SHARD}.done"]


def require_equal(first: ShardReceipt, second: ShardReceipt) -> None:
    for field in fields(ShardReceipt):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name


@pytest.mark.parametrize("threads", [0, 3])
def test_files(tmp_path: Path, threads: int) -> None:
    images = [bytes([number]) * number for number in range(1, 41)]
    images[20:23] = [MAGIC, b"abcd" + MAGIC * 2 + b"e", b"abc" + MAGIC]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, sizes = write(tmp_path / "work", threads=threads)
    require_whole(tmp_path / "work", done, images)
    assert sizes == list(map(len, images))
    assert (done.bytes_in, done.multipart) == (sum(sizes), 2)
    assert (done.reencoded, done.rotated, done.remarks) == (0, 0, [])


def test_sources_of_every_kind(tmp_path: Path) -> None:
    """Labels and ids are those of the plan, never those of the records that are read."""
    cut = b"abcd" + MAGIC + b"efg"
    framed = [image_record(99, 1, b"whole"), image_record(98, 2, cut)]
    framed.append(frame(b"\2" + bytes(23) + b"8 bytes." + b"labels"))
    (tmp_path / "x.rec").write_bytes(b"".join(framed))
    (tmp_path / "x.tar").write_bytes(b"....in tar..")
    (tmp_path / "0.jpg").write_bytes(b"own file")
    sources = [
        folder(tmp_path),
        one_file("records", tmp_path / "x.rec", 1),
        one_file("archive", tmp_path / "x.tar", 2),
    ]
    places = [(1, len(framed[0]), len(framed[1])), (2, 4, 6), (1, 0, len(framed[0]))]
    places.append((1, len(framed[0] + framed[1]), len(framed[2])))
    rows = [own_file(0, tmp_path / "0.jpg")]
    for number, (source, start, size) in enumerate(places, 1):
        rows.append(RecordRow(FIRST_ID + number, number % 3, 0, "x", source, "x", start, size, 0))
    make_table(tmp_path / "work", sources, rows)
    done, sizes = write(tmp_path / "work")
    require_whole(tmp_path / "work", done, [b"own file", cut, b"in tar", b"whole", b"labels"])
    assert sizes == [8, len(framed[1]), 6, len(framed[0]), len(framed[2])]
    assert done.bytes_in == sum(sizes)


@pytest.mark.parametrize("before", [-36, -32, -28, -24, -4, 0, 4, 40])
@pytest.mark.parametrize("inside", [b"", MAGIC])
def test_records_at_the_border_of_buffers(tmp_path: Path, before: int, inside: bytes) -> None:
    """The border cuts frame, header or image, or falls on one: there a magic word may be."""
    first = b"a" * (BUFFER - 2 * HEAD - before)  # the next image begins `before` the border
    images = [first, b"z" * max(0, before) + inside + b"tail!", b"after"]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work")
    require_whole(tmp_path / "work", done, images)
    assert done.offsets[1] + HEAD == BUFFER - before
    assert done.multipart == bool(inside)


@pytest.mark.parametrize("size", [2 * BUFFER + 5, 3 * BUFFER - HEAD, 3 * BUFFER, 5 * BUFFER + 1])
def test_images_longer_than_buffers(tmp_path: Path, size: int) -> None:
    """Over all buffers of the ring, and longer than it: also one that is cut into parts."""
    noise = np.random.default_rng(0).bytes(size)
    images = [b"before", noise, b"between", noise[:-99] + MAGIC * 20 + noise[-19:], b"after"]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work", threads=2)
    content = (tmp_path / "work" / SHARD).read_bytes()
    assert content == expected(images)
    assert done.sha256 == hashlib.sha256(content).hexdigest()
    assert done.crc32.tolist() == list(map(zlib.crc32, images))


def test_bad_images_are_all_listed(tmp_path: Path) -> None:
    images = [jpeg(number) for number in range(6)]
    images[1] = b"no image"
    images[4] = images[4][: len(images[4]) // 2]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, sizes = write(tmp_path / "work", ImageOptions())
    assert [(remark.id, remark.action) for remark in done.remarks] == [
        (FIRST_ID + 1, "failed"),
        (FIRST_ID + 4, "failed"),
    ]
    assert all(remark.reason for remark in done.remarks)
    assert sizes == list(map(len, images))
    assert [path.name for path in (tmp_path / "work").iterdir()] == [TABLE]


def test_skipped_images_leave_a_gap_in_the_ids(tmp_path: Path) -> None:
    images = [jpeg(number) for number in range(5)]
    images[1] = images[4] = b"no image"
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, sizes = write(tmp_path / "work", ImageOptions(on_bad="skip"))
    kept = [0, 2, 3]
    assert (tmp_path / "work" / SHARD).read_bytes() == b"".join(
        image_record(number % 3, FIRST_ID + number, images[number]) for number in kept
    )
    assert done.ids.tolist() == [FIRST_ID + number for number in kept]
    assert [(remark.id, remark.action) for remark in done.remarks] == [
        (FIRST_ID + 1, "skipped"),
        (FIRST_ID + 4, "skipped"),
    ]
    assert done.bytes_in == sum(sizes) == sum(map(len, images))
    require_equal(ShardReceipt.load(tmp_path / "work" / f"{SHARD}.done"), done)


def test_a_shard_without_any_image_left(tmp_path: Path) -> None:
    source, rows = files(tmp_path / "src", [b"no image", b"nor this"])
    make_table(tmp_path / "work", [source], rows)
    with pytest.raises(
        DataError, match=r"^train\.rec: all its images are skipped.*repair the images"
    ):
        write(tmp_path / "work", ImageOptions(on_bad="skip"))
    assert [path.name for path in (tmp_path / "work").iterdir()] == [TABLE]


def test_new_images_are_written_and_counted(tmp_path: Path) -> None:
    images = [jpeg(0, 40, 60), jpeg(1, 16, 24), b""]
    ok, png = cv2.imencode(".png", np.zeros((9, 7, 3), np.uint8))
    assert ok
    images[2] = png.tobytes()  # named .jpg
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work", ImageOptions(short_side=20, on_bad="convert"))
    content = (tmp_path / "work" / SHARD).read_bytes()
    written = [
        content[start + HEAD :][:size]
        for start, size in zip(done.offsets.tolist(), done.sizes.tolist(), strict=True)
    ]
    assert content == expected(written)
    assert [simplejpeg.decode_jpeg_header(image)[:2] for image in written] == [
        (20, 30),
        (16, 24),
        (9, 7),
    ]
    assert written[1] == images[1]
    assert done.crc32.tolist() == list(map(zlib.crc32, written))
    assert (done.reencoded, done.rotated, done.bytes_in) == (2, 0, sum(map(len, images)))
    assert [(remark.id, remark.action) for remark in done.remarks] == [(FIRST_ID + 2, "converted")]


@pytest.mark.parametrize("size", [IMAGE_LIMIT + 1, 3 << 30])
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_an_image_that_no_record_holds(tmp_path: Path, size: int, on_bad: str) -> None:
    source, rows = files(tmp_path / "src", [b"first", b"large", b"last"])
    with (tmp_path / "src" / "1.jpg").open("wb") as file:
        file.truncate(size)  # without blocks on disk
    rows[1] = own_file(1, tmp_path / "src" / "1.jpg")
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work", ImageOptions(check="none", on_bad=on_bad))
    reason = f"{size} bytes are too many, a record holds {IMAGE_LIMIT}"
    action = "failed" if on_bad == "fail" else "skipped"
    assert done.remarks == [Remark(FIRST_ID + 1, reason, action)]
    assert done.ids.tolist() == [FIRST_ID, FIRST_ID + 2]
    assert (tmp_path / "work" / SHARD).exists() == (on_bad == "skip")


@pytest.mark.parametrize("threads", [0, 2])
def test_a_changed_source_leaves_nothing(tmp_path: Path, threads: int) -> None:
    source, rows = files(tmp_path / "src", [b"first", b"second"])
    make_table(tmp_path / "work", [source], rows)
    os.utime(tmp_path / "src" / "1.jpg", ns=(0, rows[1].stamp + 1))
    with pytest.raises(DataError, match=r"^bee/1\.jpg: .*1\.jpg changed while it was being packed"):
        write(tmp_path / "work", threads=threads)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [TABLE]


def test_an_archive_that_changes_after_its_last_image(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"image")
    row = RecordRow(FIRST_ID, 0, 1, "x.jpg", 0, "in/x.jpg", 0, 5, 0)
    make_table(tmp_path / "work", [one_file("archive", tmp_path / "x.tar")], [row])

    def advance(images: int, size: int) -> None:
        (tmp_path / "x.tar").write_bytes(b"other")
        os.utime(tmp_path / "x.tar", ns=(0, 1))

    with pytest.raises(DataError, match=r"^x\.tar: .*x\.tar changed while it was being packed"):
        write_shard(tmp_path / "work", 0, UNCHECKED, 0, advance)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [TABLE]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stop_leaves_nothing(tmp_path: Path, threads: int) -> None:
    images = [b"first", b"x" * (2 * BUFFER), b"third"]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    with pytest.raises(StoppedError):
        write(tmp_path / "work", threads=threads, most=2)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [TABLE]
    done, _ = write(tmp_path / "work", threads=threads)
    require_whole(tmp_path / "work", done, images)


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    images = [b"first", b"second"]
    source, rows = files(tmp_path / "src", images)
    make_table(tmp_path / "work", [source], rows)
    for name in (SHARD, f"{SHARD}.tmp", f"{SHARD}.done", f"{SHARD}.done.tmp"):
        (tmp_path / "work" / name).write_bytes(b"left over " * 999)
    done, _ = write(tmp_path / "work")
    require_whole(tmp_path / "work", done, images)
