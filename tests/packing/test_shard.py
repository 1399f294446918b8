"""A shard: the records of a plan one after another, from every kind of source."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import simplejpeg

from mpl_fast.data.records import IMAGE_LIMIT, image_record, is_multipart
from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow, open_table
from mpl_fast.packing.write import shard_receipt, shard_writer
from mpl_fast.packing.write.pool import Advance, StoppedError
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import Remark, ShardReceipt
from tests.packing.packs import (
    FIRST_ID,
    MAGIC,
    ROOT,
    SHARD,
    files,
    make_table,
    one_file,
    own_file,
    png,
)

UNCHECKED = ImageOptions(check="none")
HEAD = 32  # bytes before an image
BUFFER = 1 << 16
FULL = OSError(errno.ENOSPC, "No space left on device")
PACK = """
import sys
from pathlib import Path
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, open_table
from mpl_fast.packing.write.shard import write_shard

work = Path(sys.argv[1])
with open_table(work / TABLE) as table:
    (shard,) = table.shards()
done = write_shard(work, shard, ImageOptions(), 4, lambda images, size: None)
# Not from getrusage, which includes the process that started this one.
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(done.size, status["VmHWM"].split()[0])
"""


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "BUFFER", BUFFER)
    monkeypatch.setattr(shard_writer, "_spare", [])


def jpeg(number: int, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95))


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
    work: Path,
    image_options: ImageOptions = UNCHECKED,
    threads: int = 0,
    advance: Advance = lambda images, size: None,
) -> tuple[ShardReceipt, list[int]]:
    """Write the shard; return its receipt and the sizes that it advanced by."""
    sizes: list[int] = []

    def collect(images: int, size: int) -> None:
        sizes.append(size)
        advance(images, size)

    with open_table(work / TABLE) as table:
        (shard,) = table.shards()
    return write_shard(work, shard, image_options, threads, collect), sizes


def require_whole(work: Path, done: ShardReceipt, images: list[bytes]) -> None:
    """Check the shard and its receipt against all planned images."""
    content = (work / SHARD).read_bytes()
    records = records_of(images)
    assert content == b"".join(records)
    assert (done.file, done.content, done.stamps) == (SHARD, "what", "when")
    assert (done.size, done.checksum) == (len(content), f"{zlib.crc32(content):08x}")
    assert done.multipart == sum(map(is_multipart, records))
    assert done.ids.tolist() == list(range(FIRST_ID, FIRST_ID + len(images)))
    assert done.lengths.tolist() == list(map(len, records))
    assert done.offsets.tolist() == [sum(map(len, records[:at])) for at in range(len(records))]
    assert done.sizes.tolist() == list(map(len, images))
    assert done.crc32.tolist() == list(map(zlib.crc32, images))
    require_saved(work, done)
    assert names(work) == [TABLE, SHARD, f"{SHARD}.done"]


def require_saved(work: Path, done: ShardReceipt) -> None:
    saved = ShardReceipt.load(work / f"{SHARD}.done")
    for field in fields(ShardReceipt):
        assert np.array_equal(getattr(saved, field.name), getattr(done, field.name)), field.name


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


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


def test_buffers_are_those_of_the_shard_before(tmp_path: Path) -> None:
    """Without a rest of it in the file."""
    with closing(shard_writer.ShardWriter(tmp_path / "first")) as first:
        first.append(b"1" * (2 * BUFFER + 5))
        first.finish()
        buffers = first._buffers
    with (
        closing(shard_writer.ShardWriter(tmp_path / "second")) as second,
        closing(shard_writer.ShardWriter(tmp_path / "3")) as other,
    ):
        assert second._buffers is buffers
        assert other._buffers is not buffers
        second.append(b"2" * (BUFFER + 3))
        second.finish()
    assert (tmp_path / "second").read_bytes() == b"2" * (BUFFER + 3)


def test_buffers_of_a_writer_closed_twice_are_not_used_twice(tmp_path: Path) -> None:
    writer = shard_writer.ShardWriter(tmp_path / "first")
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.close()
    assert len(shard_writer._spare) == 1


@pytest.mark.parametrize("size", [2 * BUFFER + 5, 3 * BUFFER - HEAD, 3 * BUFFER, 5 * BUFFER + 1])
def test_images_longer_than_buffers(tmp_path: Path, size: int) -> None:
    """Images as long as the whole ring of buffers and longer, of one part and of several."""
    noise = np.random.default_rng(0).bytes(size)
    images = [b"before", noise, b"between", noise[:-99] + MAGIC * 20 + noise[-19:], b"after"]
    work = plan(tmp_path, images)
    require_whole(work, write(work, threads=2)[0], images)


@pytest.mark.parametrize("size", [4096, BUFFER, 3 * BUFFER, 5 * BUFFER + 4096])
def test_files_that_end_with_a_block_or_buffer(tmp_path: Path, size: int) -> None:
    images = [bytes(size - HEAD)]
    work = plan(tmp_path, images)
    (work / f"{SHARD}.tmp").write_bytes(b"old" * size)
    require_whole(work, write(work)[0], images)


@pytest.mark.parametrize("when", ["opened", "first write", "second write"])
def test_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A file system refuses them when the file is opened, or only with a write; here it also
    writes less than it is given."""
    refused = []
    real_write, real_control = os.pwrite, fcntl.fcntl
    limit = {"opened": -1, "first write": 0, "second write": 1}[when]

    def control(file: int, command: int, value: int = 0) -> int:
        if when == "opened" and value & os.O_DIRECT:
            refused.append(command)
            raise OSError(errno.EINVAL, "no direct writes here")
        return int(real_control(file, command, value))

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        direct = real_control(file, fcntl.F_GETFL) & os.O_DIRECT
        if when != "opened" and offset >= limit * BUFFER and not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct writes here")
        assert not (direct and refused)
        return real_write(file, content[:8192], offset)

    images = [bytes([number]) * BUFFER for number in range(3)]
    work = plan(tmp_path, images)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "pwrite", pwrite)
    require_whole(work, write(work)[0], images)
    assert len(refused) == 1


def test_bad_images(tmp_path: Path) -> None:
    """Where a bad image is an error all are listed; skipped ones leave a gap in the ids."""
    images = [jpeg(number) for number in range(6)]
    images[1] = b"no image"
    images[5] = images[5][: len(images[5]) // 2]
    work = plan(tmp_path, images)
    for on_bad, action in (("fail", "failed"), ("skip", "skipped")):
        done, sizes = write(work, ImageOptions(on_bad=on_bad))
        assert sizes == list(map(len, images))
        assert all(remark.reason for remark in done.remarks)
        assert [(remark.id - FIRST_ID, remark.action) for remark in done.remarks] == [
            (1, action),
            (5, action),
        ]
        assert (work / SHARD).exists() == (on_bad == "skip")
    records = records_of(images)
    assert (work / SHARD).read_bytes() == b"".join(records[number] for number in (0, 2, 3, 4))
    assert done.ids.tolist() == [FIRST_ID + number for number in (0, 2, 3, 4)]
    assert done.bytes_in == sum(sizes)
    require_saved(work, done)


def test_a_shard_without_any_image_left(tmp_path: Path) -> None:
    work = plan(tmp_path, [b"no image", b"nor this"])
    message = r"^train\.rec: all its images are skipped.*repair the images"
    with pytest.raises(DataError, match=message):
        write(work, ImageOptions(on_bad="skip"))
    assert names(work) == [TABLE]


def test_new_images_are_written_and_counted(tmp_path: Path) -> None:
    images = [jpeg(0, 40, 60), jpeg(1, 16, 24), png(0)]
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
    assert done.remarks == [Remark(FIRST_ID + 2, "a PNG named .jpg", "converted")]


@pytest.mark.parametrize(("on_bad", "action"), [("fail", "failed"), ("skip", "skipped")])
def test_images_too_large_for_a_record(tmp_path: Path, on_bad: str, action: str) -> None:
    source, rows = files(tmp_path / "src", [b"first", b"", b"", b"last"])
    sizes = {1: IMAGE_LIMIT + 1, 2: 3 << 30}
    for number, size in sizes.items():
        path = tmp_path / "src" / f"{number}.jpg"
        os.truncate(path, size)  # without blocks on disk
        rows[number] = own_file(number, path)
    make_table(tmp_path / "work", [source], rows)
    done, _ = write(tmp_path / "work", ImageOptions(check="none", on_bad=on_bad))
    assert done.remarks == [
        Remark(FIRST_ID + at, f"{size} bytes are too many, a record holds {IMAGE_LIMIT}", action)
        for at, size in sizes.items()
    ]
    assert done.ids.tolist() == [FIRST_ID, FIRST_ID + 3]
    assert (tmp_path / "work" / SHARD).exists() == (on_bad == "skip")


@pytest.mark.parametrize("threads", [0, 2])
def test_a_changed_source_leaves_nothing(tmp_path: Path, threads: int) -> None:
    work = plan(tmp_path, [b"first", b"second"])
    path = tmp_path / "src" / "1.jpg"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"^bee/1\.jpg: .*1\.jpg changed while it was being packed"):
        write(work, threads=threads)
    path.unlink()
    with pytest.raises(DataError, match=r"1\.jpg: No such file .*it was there when planned"):
        write(work, threads=threads)
    assert names(work) == [TABLE]


def test_an_archive_that_changes_after_its_last_image(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"image")
    row = RecordRow(FIRST_ID, 0, 1, "x.jpg", 0, "in/x.jpg", 0, 5, 0)
    make_table(tmp_path / "work", [one_file("archive", archive)], [row])
    with pytest.raises(DataError, match=r"^x\.tar: .*x\.tar changed while it was being packed"):
        write(tmp_path / "work", advance=lambda images, size: os.utime(archive, ns=(0, 1)))
    assert names(tmp_path / "work") == [TABLE]


@pytest.mark.parametrize("threads", [0, 2])
def test_interrupted_runs(tmp_path: Path, threads: int) -> None:
    """A stop leaves no file; files of a killed run are replaced."""
    images = [b"first", b"x" * (2 * BUFFER), b"third"]
    work = plan(tmp_path, images)

    def stop(images: int, size: int) -> None:
        if size > 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        write(work, threads=threads, advance=stop)
    assert names(work) == [TABLE]
    for name in (SHARD, f"{SHARD}.tmp", f"{SHARD}.done", f"{SHARD}.done.tmp"):
        (work / name).write_bytes(bytes(9 * BUFFER))
    require_whole(work, write(work, threads=threads)[0], images)


@pytest.mark.parametrize(("buffer", "images_done"), [(0, 0), (5, 1), (11, 3), (12, 3)])
def test_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, images_done: int
) -> None:
    """The run ends when the failed buffer is used again, at the latest at the end."""
    images = [b"x" * (4 * BUFFER)] * 3
    work = plan(tmp_path, images)
    real_write = os.pwrite
    done = []

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        if offset == buffer * BUFFER:
            raise FULL
        return real_write(file, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=f"^{work}: No space left on device$"):
            write(work, advance=lambda images, size: done.append(size))
    assert len(done) <= images_done
    assert names(work) == [TABLE]
    require_whole(work, write(work)[0], images)


def test_no_space_for_the_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard stays, but is not finished."""
    work = plan(tmp_path, [b"first", b"second"])
    write(work)
    with monkeypatch.context() as patch:
        patch.setattr(shard_receipt, "write_bytes", mock.Mock(side_effect=FULL))
        with pytest.raises(OutputError, match=f"^{work}: No space left on device$"):
            write(work)
    assert names(work) == [TABLE, SHARD]
    require_whole(work, write(work)[0], [b"first", b"second"])


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """As when the output is deleted during the run."""
    work = plan(tmp_path, [b"first", b"second"])
    with pytest.raises(OutputError, match=r"work.*: No such file or directory$"):
        write(work, advance=lambda images, size: shutil.rmtree(work, ignore_errors=True))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """300 MB of images that are decoded, each of them stored once in the source."""
    image = bytes(simplejpeg.encode_jpeg(np.zeros((1500, 2000, 3), np.uint8))) + bytes(6_000_000)
    (tmp_path / "x.tar").write_bytes(image)
    count = 300_000_000 // len(image)
    row = RecordRow(0, 0, 1, "x.jpg", 0, "x.jpg", 0, len(image), 0)
    rows = [row._replace(id=FIRST_ID + number) for number in range(count)]
    make_table(tmp_path / "work", [one_file("archive", tmp_path / "x.tar")], rows)
    command = [sys.executable, "-c", PACK, str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written, peak = map(int, done.stdout.split())
    assert written == count * len(image_record(0, 0, image))
    assert 20 < peak * 1024 / 1e6 < 200
